"""The networks of benchmarks/zoo.py: each with random weights and an input of its usual size."""

import contextlib
import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimming.channels.inputs import Inputs, call, smaller

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no weights are loaded
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
os.environ.setdefault("YOLO_AUTOINSTALL", "0")
os.environ.setdefault("YOLO_VERBOSE", "0")

Case = tuple[nn.Module, Inputs]
Builder = Callable[[], Case]

# The smallest member of each family and architecture.
TIMM = """
bat_resnext26ts eca_resnet33ts eca_resnext26ts gcresnet33ts gcresnet50t gcresnext26ts gernet_s
mobileone_s0 regnetz_b16 regnetz_b16_evos regnetz_c16 regnetz_d8 repvgg_a0 repvgg_b1g4 repvgg_d2se
resnet32ts resnet33ts resnet50_clip resnet50_clip_gap resnet50_mlp resnet51q resnet61q resnext26ts
seresnet33ts seresnext26ts
convmixer_768_32 convnext_atto convnext_atto_ols convnext_atto_rms convnext_tiny_hnf
convnext_zepto_rms convnextv2_atto
cs3darknet_focus_s cs3darknet_s cs3edgenet_x cs3se_edgenet_x cs3sedarknet_l cs3sedarknet_xdw
cspdarknet53 cspresnet50 cspresnet50d cspresnet50w cspresnext50 darknet17 darknet53 darknetaa53
sedarknet21 cspnext_tiny
densenet121 densenetblur121d dla34 dla46_c dla46x_c dla60_res2net dla60_res2next dpn48b dpn68
dpn68b
efficientnet_b0 efficientnet_b0_g8_gn efficientnet_b0_g16_evos efficientnet_b0_gn
efficientnet_b1_pruned efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_el_pruned
efficientnet_es efficientnet_lite0 efficientnet_x_b3 efficientnetv2_rw_t fbnetc_100
gc_efficientnetv2_rw_t mixnet_s mnasnet_050 mnasnet_small mobilenet_edgetpu_100
mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv1_100h mobilenetv2_035 mobilenetv2_110d
semnasnet_050 spnasnet_100 test_efficientnet_ln tf_efficientnet_b0 tf_efficientnet_lite0
tf_efficientnetv2_b0 tf_mixnet_s tinynet_e
fasternet_t0 ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny hgnetv2_b0
hrnet_w18_small hrnet_w18_small_v2 hrnet_w18_ssld inception_next_atto inception_resnet_v2
inception_v3 inception_v4 lcnetv2_small mambaout_femto
fbnetv3_b lcnet_035 mobilenetv3_rw mobilenetv3_small_050 mobilenetv4_conv_small_035
mobilenetv4_conv_aa_medium mobilenetv4_conv_blur_medium tf_mobilenetv3_small_minimal_100
nasnetalarge pnasnet5large
dm_nfnet_f0 eca_nfnet_l0 nf_ecaresnet26 nf_regnet_b0 nf_resnet26 nf_seresnet26 nfnet_l0 nfnet_f0
rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnety_040_sgn regnetz_005 regnetz_040_h
repghostnet_050 repvit_m0_9 repvit_m1 res2net50_14w_8s res2net50d res2next50 resnest14d
resnest50d_1s4x24d
ecaresnet26t ecaresnet50d_pruned ecaresnetlight ecaresnext26t_32x4d resnet10t resnet18 resnet18d
resnet26 resnet26t resnet50 resnet50_gn resnet50c resnet50s resnetaa34d resnetblur18 resnetrs50
resnext50_32x4d seresnet18 seresnext26d_32x4d seresnextaa101d_32x8d senet154 wide_resnet50_2
resnetv2_18 resnetv2_18d resnetv2_50 resnetv2_50d_evos resnetv2_50d_frn resnetv2_50d_gn
resnetv2_50x1_bit
rexnet_100 rexnetr_100 selecsls42 selecsls42b legacy_seresnet18 legacy_seresnext26_32x4d
legacy_senet154 skresnet18 skresnet50 skresnext50_32x4d starnet_s050 tresnet_m tresnet_v2_l
vgg11 vgg11_bn ese_vovnet19b_slim_dw ese_vovnet19b_slim eca_vovnet39b ese_vovnet39b_evos vovnet39a
legacy_xception xception41 xception41p poolformer_s12 poolformerv2_s12 convformer_s18
"""

# Convolutions with attention.
TIMM_HYBRID = """
botnet26t_256 eca_botnext26ts_256 eca_halonext26ts halonet26t halo2botnet50ts_256 haloregnetz_b
lambda_resnet26t lambda_resnet26rpt_256 lamhalobotnet50ts_256 sebotnet33ts_256
coat_lite_tiny coatnet_pico_rw_224 coatnet_bn_0_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256
maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 cpubone_nano crossvit_9_240 csatv2 davit_tiny
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0
efficientvit_l1 efficientvit_m0 fastvit_t8 fastvit_mci0 fastvit_sa12 focalnet_tiny_srf gcvit_xxtiny
iformer_t levit_128s levit_conv_128s lowformer_b0 caformer_s18 mobilenetv4_hybrid_medium_075
mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small pit_ti_224 pvt_v2_b0 sequencer2d_s
shvit_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tiny_vit_5m_224
twins_svt_small visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
xcit_nano_12_p16_224 vit_base_mci_224 convit_tiny cait_xxs24_224 deit_tiny_patch16_224
gmlp_ti16_224 mixer_s32_224 resmlp_12_224 hiera_tiny_224
"""

ULTRALYTICS = """
yolov3-tiny yolov3-spp yolov5n yolov5n-p6 yolov6n yolov8n yolov8n-ghost yolov8n-p2 yolov8n-p6
yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov8n-cls-resnet50 yolov8n-rtdetr yolov9t
yolov9c-seg yolov10n yolov10s yolo11n yolo11n-seg yolo11n-pose yolo11n-obb yolo11n-cls
yolo11n-cls-resnet18 yolo12n yolo12n-seg yolo12n-cls yolo26n yolo26n-p2 yolo26n-seg yolo26n-pose
yolo26n-obb yolo26n-cls yolo26n-sem yolo26n-depth rtdetr-resnet50 rtdetr-l
"""

SMP = """
Unet/resnet18 Unet/mobilenet_v2 Unet/efficientnet-b0 Unet/vgg11_bn Unet/densenet121 Unet/dpn68
Unet/se_resnet50 Unet/resnext50_32x4d Unet/inceptionv4 Unet/xception Unet/mobileone_s0 Unet/mit_b0
Unet/timm-regnetx_002 Unet/timm-mobilenetv3_small_100 UnetPlusPlus/resnet18 MAnet/resnet18
Linknet/resnet18 FPN/resnet18 PSPNet/resnet18 PAN/resnet18 DeepLabV3/resnet18
DeepLabV3Plus/resnet18 DeepLabV3Plus/efficientnet-b0 UPerNet/resnet18 Segformer/resnet18
Segformer/mit_b0 FPN/timm-res2net50_14w_8s
"""


def networks() -> dict[str, Builder]:
    """The names of all networks, as source/name, and what builds each."""
    found: dict[str, Builder] = {}
    for source, names in (("timm", TIMM), ("timm-hybrid", TIMM_HYBRID)):
        found |= {f"{source}/{name}": functools.partial(of_timm, name) for name in names.split()}
    for kind in ("classification", "segmentation", "detection"):
        module = torchvision.models
        module = module if kind == "classification" else getattr(module, kind)
        for name in torchvision.models.list_models(module=module):
            found[f"torchvision-{kind}/{name}"] = functools.partial(of_torchvision, kind, name)
    for name in ULTRALYTICS.split():
        found[f"ultralytics/{name}"] = functools.partial(of_ultralytics, name)
    for name in SMP.split():
        found[f"smp/{name}"] = functools.partial(of_smp, *name.split("/"))
    for builders in (MONAI, AUDIO, OCR, SUPER_RESOLUTION):
        found |= builders
    return found


PACKAGES = {
    "timm": ["timm"],
    "timm-hybrid": ["timm"],
    "ultralytics": ["ultralytics.nn.tasks"],
    "smp": ["segmentation_models_pytorch"],
    "monai": ["monai.networks.nets"],
    "audio": ["torchaudio.models"],
    "ocr": ["easyocr.craft"],
}


def load(names: list[str]) -> None:
    """Import what builds these networks. ImportError of what is missing is left to the builders."""
    for source in sources(names):
        for package in PACKAGES.get(source, []):
            with contextlib.suppress(ImportError):
                importlib.import_module(package)


def images(size: int, channels: int = 3, dims: int = 2) -> torch.Tensor:
    return torch.rand(1, channels, *[size] * dims)


def of_timm(name: str) -> Case:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, torch.randn(1, *model.default_cfg["input_size"])


def of_torchvision(kind: str, name: str) -> Case:
    arguments: dict[str, Any] = {"weights": None}
    if kind != "classification":
        arguments["weights_backbone"] = None
    if kind == "detection":  # all boxes are proved, not only those of a trained network
        one_stage = name.startswith(("retinanet", "ssd", "fcos"))
        arguments["score_thresh" if one_stage else "box_score_thresh"] = 0.0
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False  # 30 s, with SciPy
    model = torchvision.models.get_model(name, **arguments)
    if kind == "detection":
        size = 300 if name.startswith("ssd300") else 320
        return model, ([torch.rand(3, size, size)],)
    size = 520 if kind == "segmentation" else 299 if name == "inception_v3" else 224
    return model, torch.randn(1, 3, size, size)


def of_ultralytics(name: str) -> Case:
    from ultralytics.nn import tasks

    kinds = {
        **{"seg": "SegmentationModel", "pose": "PoseModel", "obb": "OBBModel"},
        **{"cls": "ClassificationModel", "sem": "SemanticSegmentationModel", "depth": "DepthModel"},
    }
    kind = next((kinds[word] for word in name.split("-") if word in kinds), "DetectionModel")
    kind = "RTDETRDetectionModel" if "rtdetr" in name else kind
    model = getattr(tasks, kind)(f"{name}.yaml", verbose=False)
    return model, images(224 if kind == "ClassificationModel" else 640)


def of_smp(arch: str, encoder: str) -> Case:
    import segmentation_models_pytorch as smp

    model = getattr(smp, arch)(encoder_name=encoder, encoder_weights=None, classes=3)
    return model, images(256)


def of_monai(name: str, arguments: dict[str, Any], size: int = 64, dims: int = 3) -> Case:
    from monai.networks import nets

    return getattr(nets, name)(**arguments), images(size, 1, dims)


VOLUMES: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
PLANES: dict[str, Any] = {"in_channels": 1, "out_channels": 3}
LEVELS: dict[str, Any] = {"channels": (16, 32, 64, 128), "strides": (2, 2, 2)}
DYNUNET: dict[str, Any] = {
    **VOLUMES,
    **{"kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, 2], "upsample_kernel_size": [2, 2, 2]},
    "res_block": True,
}
AUTOENCODER_KL: dict[str, Any] = {
    **VOLUMES,
    **{"channels": (32, 32, 64), "attention_levels": (False, False, False), "num_res_blocks": 1},
    **{"latent_channels": 3, "norm_num_groups": 16},
    **{"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False},
}
VQVAE: dict[str, Any] = {
    **VOLUMES,
    **{"channels": (32, 64), "num_res_layers": 1, "num_res_channels": (32, 64)},
    **{"num_embeddings": 64, "embedding_dim": 16},
    **{"downsample_parameters": ((2, 4, 1, 1),) * 2},
    **{"upsample_parameters": ((2, 4, 1, 1, 0),) * 2},
}
DISCRIMINATOR: dict[str, Any] = {
    **{"in_shape": (1, 64, 64), "channels": (16, 32, 64), "strides": (2, 2, 2)}
}
EFFICIENTNET: dict[str, Any] = {
    "model_name": "efficientnet-b0",
    "spatial_dims": 3,
    "in_channels": 1,
}
MONAI: dict[str, Builder] = {
    f"monai/{name}": functools.partial(of_monai, name, *arguments)
    for name, *arguments in (
        ("UNet", {**VOLUMES, **LEVELS, "num_res_units": 2}),
        ("AttentionUnet", {**VOLUMES, **LEVELS}),
        ("BasicUNet", VOLUMES),
        ("BasicUNetPlusPlus", {**VOLUMES, "features": (16, 16, 32, 64, 128, 16)}),
        ("DynUNet", DYNUNET),
        ("SegResNet", {**PLANES, "init_filters": 16}),
        ("SegResNetVAE", {**PLANES, "input_image_size": (64, 64, 64)}),
        ("SegResNetDS", {**PLANES, "init_filters": 16}),
        ("VNet", VOLUMES),
        ("HighResNet", VOLUMES),
        ("MedNeXtSmall", VOLUMES),
        ("AHNet", {**VOLUMES, "psp_block_num": 0}),
        ("FlexibleUNet", {**PLANES, "backbone": "efficientnet-b0"}, 64, 2),
        ("UNETR", {**PLANES, "img_size": (64, 64, 64)}),
        ("SwinUNETR", {**PLANES, "feature_size": 12}),
        ("DenseNet121", VOLUMES),
        ("EfficientNetBN", EFFICIENTNET),
        ("resnet18", {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 3}),
        ("SEResNet50", {"spatial_dims": 3, "in_channels": 1, "num_classes": 3}),
        ("AutoEncoder", {**VOLUMES, **LEVELS}),
        ("AutoencoderKL", AUTOENCODER_KL, 32),
        ("VQVAE", VQVAE, 32),
        ("Discriminator", DISCRIMINATOR, 64, 2),
        ("QuickNAT", {"num_classes": 3, "num_channels": 1}, 64, 2),
    )
}


def of_torchaudio(name: str, arguments: dict[str, Any], *shapes: tuple[int, ...]) -> Case:
    from torchaudio import models

    inputs = tuple(torch.randn(shape) for shape in shapes)
    return getattr(models, name)(**arguments), inputs


def conformer() -> Case:
    from torchaudio import models

    model = models.Conformer(80, 4, 256, 4, 31)
    return model, (torch.randn(1, 200, 80), torch.tensor([200]))


WAVERNN = {"upsample_scales": [5, 5, 8], "n_classes": 512, "hop_length": 200}
AUDIO: dict[str, Builder] = {
    "audio/wav2letter": functools.partial(of_torchaudio, "Wav2Letter", {}, (1, 1, 16000)),
    "audio/conv_tasnet": functools.partial(of_torchaudio, "ConvTasNet", {}, (1, 1, 16000)),
    "audio/deepspeech": functools.partial(
        of_torchaudio, "DeepSpeech", {"n_feature": 80, "n_hidden": 512}, (1, 1, 100, 80)
    ),
    "audio/wavernn": functools.partial(
        of_torchaudio, "WaveRNN", WAVERNN, (1, 1, 1200), (1, 1, 128, 10)
    ),
    "audio/hdemucs_low": functools.partial(
        of_torchaudio, "hdemucs_low", {"sources": ["drums", "voice"]}, (1, 2, 32768)
    ),
    "audio/squim_objective": functools.partial(
        of_torchaudio, "squim_objective_base", {}, (1, 16000)
    ),
    "audio/wav2vec2_base": functools.partial(of_torchaudio, "wav2vec2_base", {}, (1, 16000)),
    "audio/conformer": conformer,
}


def recognizer(generation: str) -> Case:
    """EasyOCR's recogniser of text: a CNN, two LSTMs, a linear layer."""
    from easyocr.model import model, vgg_model

    if generation == "vgg":
        return vgg_model.Model(1, 256, 256, 97), (torch.rand(1, 1, 64, 256), torch.zeros(1, 26))
    return model.Model(1, 512, 512, 97), (torch.rand(1, 1, 64, 256), torch.zeros(1, 26))


def text_detector() -> Case:
    from easyocr.craft import CRAFT

    return CRAFT(pretrained=False), images(320)


class CRNN(nn.Module):
    """Shi et al., 2015 (arXiv 1507.05717): convolutions to one row, two LSTMs, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 64, 128, 256, 256, 512, 512]
        pools = [(2, 2), (2, 2), None, (2, 1), None, (2, 1)]
        layers: list[nn.Module] = []
        for before, width, pool in zip(widths, widths[1:], pools, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(pool)] if pool else []
        self.features = nn.Sequential(*layers, nn.Conv2d(512, 512, 2), nn.ReLU())
        self.lstm = nn.LSTM(512, 256, num_layers=2, bidirectional=True)
        self.classifier = nn.Linear(512, 37)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.features(x).squeeze(2).permute(2, 0, 1)
        return self.classifier(self.lstm(rows)[0])


OCR: dict[str, Builder] = {
    "ocr/easyocr-vgg": functools.partial(recognizer, "vgg"),
    "ocr/easyocr-resnet": functools.partial(recognizer, "resnet"),
    "ocr/craft": text_detector,
    "ocr/crnn": lambda: (CRNN(), torch.rand(1, 1, 32, 128)),
}


class Residual(nn.Module):
    """A block of EDSR: no BatchNorm, a scaled sum."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.conv2(self.conv1(x).relu())


class EDSR(nn.Module):
    """Lim et al., 2017 (arXiv 1707.02921), the baseline; four times as large in two steps."""

    def __init__(self, width: int = 64, blocks: int = 16):
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        body = [Residual(width) for _ in range(blocks)]
        self.body = nn.Sequential(*body, nn.Conv2d(width, width, 3, padding=1))
        steps: list[nn.Module] = []
        for _ in range(2):
            steps += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(*steps, nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(x)
        return self.tail(x + self.body(x))


def espcn() -> nn.Module:
    """Shi et al., 2016 (arXiv 1609.05158): the last layer makes the pixels of the image."""
    return nn.Sequential(
        *(nn.Conv2d(1, 64, 5, padding=2), nn.Tanh(), nn.Conv2d(64, 32, 3, padding=1), nn.Tanh()),
        *(nn.Conv2d(32, 9, 3, padding=1), nn.PixelShuffle(3)),
    )


def fsrcnn() -> nn.Module:
    """Dong et al., 2016 (arXiv 1608.00367): a transposed convolution makes the image."""
    layers = [nn.Conv2d(1, 56, 5, padding=2), nn.PReLU(56), nn.Conv2d(56, 12, 1), nn.PReLU(12)]
    for _ in range(4):
        layers += [nn.Conv2d(12, 12, 3, padding=1), nn.PReLU(12)]
    layers += [nn.Conv2d(12, 56, 1), nn.PReLU(56)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(56, 1, 9, 3, 4, 2))


SUPER_RESOLUTION: dict[str, Builder] = {
    "super-resolution/edsr": lambda: (EDSR(), images(48)),
    "super-resolution/espcn": lambda: (espcn(), images(64, 1)),
    "super-resolution/fsrcnn": lambda: (fsrcnn(), images(64, 1)),
}


@torch.no_grad()
def randomize(model: nn.Module, inputs: Inputs, seed: int = 0) -> None:
    """Random values for each parameter that is constant (scaling factors, biases, layer scales),
    and random BN statistics about those of the inputs: no layer is dead, a wrong rule shows."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() < 2:
            continue
        first = parameter.flatten()[0]
        if bool((parameter == first).all()):
            limits = (-0.1, 0.1) if first == 0 else (0.6, 1.4)
            parameter.copy_(uniform(parameter, *limits))

    def normalize(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        mean, var = layer.running_mean, layer.running_var
        if args[0].numel() > len(mean):
            rows = args[0].transpose(0, 1).flatten(1)
            mean, var = rows.mean(1), rows.var(1)
        scale = var.clamp_min(1e-4)
        layer.running_mean.copy_(mean + scale.sqrt() * uniform(mean, -0.3, 0.3))
        layer.running_var.copy_(scale * uniform(var, 0.5, 1.5))

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_var is not None]
    small = smaller(inputs)
    handles = [norm.register_forward_pre_hook(normalize) for norm in norms]
    try:
        with contextlib.suppress(Exception):  # a network of one size
            call(model.eval(), inputs if small is None else small)
            return
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def sources(names: list[str]) -> Iterator[str]:
    """The sources of networks, each once."""
    yield from dict.fromkeys(name.partition("/")[0] for name in names)

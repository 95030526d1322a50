"""What users of other suites type: that of preact_res20, and that of Lubana and Dick."""

import main
import models
from slimming import sparsity


def test_second_names():
    assert models.ChannelSelection is models.channel_selection
    assert main.update_bn is sparsity.update_bn is sparsity.updateBN

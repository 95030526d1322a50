"""Network Slimming (Liu et al., ICCV 2017): what two or more of the scripts share."""

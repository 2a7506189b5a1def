"""An exact plan of any cluster layout, without GPUs: see ``plan``."""

"""What does not depend on a framework: the recipes for 8-bit floats."""

from . import recipe as recipe

import os

# Set before torch starts: its threads should sleep while they wait for each other. By default they spin, and take the
# cores from those they wait for: beside another busy program a step of `tiny` then takes ten times as long. The price, alone on
# two cores: about a tenth.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

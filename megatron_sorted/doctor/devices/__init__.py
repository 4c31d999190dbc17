"""Checks of kinds of devices: the only folder of the doctor that names them."""

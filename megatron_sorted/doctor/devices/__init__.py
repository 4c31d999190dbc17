"""What the doctor knows of kinds of devices: the only folder of it that names them."""

"""What measures, reproduces and draws. Nothing of the product imports it."""

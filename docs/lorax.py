"""What users import `eqx_lorax` as. `signatures.py` puts the public names here."""

"""The checkpoint format of PEFT: paths (`names`), tensors (`layout`), the configuration
(`config`), and going there (`writing`) and back (`reading`)."""

"""Commands from a folder of photographs, or a name, to a trained run."""

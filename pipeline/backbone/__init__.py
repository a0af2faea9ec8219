"""The frozen pretrained model and the roles on it."""

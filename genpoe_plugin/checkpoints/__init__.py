"""The directory of a hypernetwork: load, save and push, and its model card."""

"""Every published number of Tidegate, one command each. See README.md in this folder."""

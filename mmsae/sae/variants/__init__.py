"""Methods of the literature, one file each: the parts and the loss terms that a paper adds."""

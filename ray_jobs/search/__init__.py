"""What a hyper-parameter search is made of: the declared space, the study, the trials, the answer."""

"""What users can ask for, on one pair of sites that all tests share: so names are not to be taken twice."""

"""Labels of training other than the Bayesian mask."""

"""What is learned, and what it makes: the dVAE, the transformer, their training and sampling."""

"""Second order: square roots of curvature matrices, where they come from and what is made of them."""

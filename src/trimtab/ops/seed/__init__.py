"""What only the pull request's operator needs: modules with tensors of their own, and the monitor as an operator."""

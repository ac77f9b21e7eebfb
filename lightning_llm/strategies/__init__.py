"""Where a model is trained: the mesh, one parallel axis a file, and the strategy that calls them in one order."""

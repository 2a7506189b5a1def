"""What is checked before a model is built: that ranks agree, and that nothing is known to go wrong.

It imports the layout, documents and options; importing it imports no torch.
"""

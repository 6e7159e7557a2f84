"""What the policies are made of. Weights are allocated by the loader; modules here only name shapes and
maths.
"""

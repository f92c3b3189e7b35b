"""Export: one traced file per network, a manifest that explains it, and a certificate that it computes what the
network does; or its weights alone."""

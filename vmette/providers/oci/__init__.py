"""`oci`: container images from registries that speak the OCI distribution protocol."""

"""From archives to root filesystems: layers are read, laid over each other and written as one image.

Nothing here knows of registries or of URLs, and nothing of an archive ever becomes a path of the host.
"""

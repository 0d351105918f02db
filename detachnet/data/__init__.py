"""images -> batches: data sets in memory and image files, the same batches for the same seed.

datasets -> batches                        held in memory as uint8, augmented a batch at a time
listing -> folders, images, shards -> loader   read image by image, through timm
embedded                                   the images that ship with the package
"""

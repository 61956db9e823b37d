"""What is not supported, or may surprise, in several families: see `Family.limits`."""

NO_REPRESENTATIVE = 'unmerge="representative" is refused'
CACHE_FAST = 'cache="fast" is refused'

TILES_APART = "each tile of an image is reported as an image of its own"

TILES_JOINED = "all images of a prompt, and their tiles, are reported as one (before transformers 5.21, each by itself)"

PADDED = "pictures padded within their pixels are refused"

FRAMES_ARE_IMAGES = "the frames of a video are images to the model, and so to dymu"

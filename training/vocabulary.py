"""The closed world of the demo model: what it can name, and every word it is trained on."""

from functools import cache

from training.assets import photos

EMOJI: dict[str, tuple[str, ...]] = {
    name: tuple(codes.split())
    for name, codes in {
        # animals
        "mouse": "1f401 1f42d", "cow": "1f404 1f42e", "tiger": "1f405 1f42f", "leopard": "1f406",
        "rabbit": "1f407 1f430", "cat": "1f408 1f431", "dragon": "1f409 1f432",
        "crocodile": "1f40a", "whale": "1f40b 1f433", "snail": "1f40c", "snake": "1f40d",
        "horse": "1f40e 1f434", "goat": "1f410", "sheep": "1f411", "monkey": "1f412 1f435",
        "rooster": "1f413", "chicken": "1f414", "dog": "1f415 1f436", "pig": "1f416 1f437",
        "elephant": "1f418", "octopus": "1f419", "shell": "1f41a", "ant": "1f41c", "bee": "1f41d",
        "ladybug": "1f41e", "fish": "1f41f 1f420", "turtle": "1f422", "bird": "1f426",
        "penguin": "1f427", "koala": "1f428", "camel": "1f42a 1f42b", "dolphin": "1f42c",
        "frog": "1f438", "wolf": "1f43a", "bear": "1f43b", "panda": "1f43c", "crab": "1f980",
        "lion": "1f981", "scorpion": "1f982", "eagle": "1f985", "duck": "1f986", "bat": "1f987",
        "shark": "1f988", "owl": "1f989", "fox": "1f98a", "butterfly": "1f98b", "deer": "1f98c",
        "gorilla": "1f98d", "lizard": "1f98e", "rhino": "1f98f", "giraffe": "1f992",
        "zebra": "1f993", "hedgehog": "1f994", "kangaroo": "1f998", "llama": "1f999",
        "peacock": "1f99a", "hippo": "1f99b", "parrot": "1f99c", "lobster": "1f99e",
        "swan": "1f9a2", "flamingo": "1f9a9", "bison": "1f9ac",
        # plants and food
        "tree": "1f333 1f332", "palm": "1f334", "cactus": "1f335", "tulip": "1f337",
        "rose": "1f339", "sunflower": "1f33b", "mushroom": "1f344", "tomato": "1f345",
        "grapes": "1f347", "watermelon": "1f349", "lemon": "1f34b", "banana": "1f34c",
        "pineapple": "1f34d", "apple": "1f34e 1f34f", "pear": "1f350", "strawberry": "1f353",
        "burger": "1f354", "pizza": "1f355", "bread": "1f35e", "donut": "1f369",
        "cookie": "1f36a", "lollipop": "1f36d", "cake": "1f382", "corn": "1f33d",
        "carrot": "1f955", "broccoli": "1f966", "avocado": "1f951", "egg": "1f95a",
        "cheese": "1f9c0", "pretzel": "1f968", "croissant": "1f950", "coconut": "1f965",
        # music
        "guitar": "1f3b8", "violin": "1f3bb", "trumpet": "1f3ba", "saxophone": "1f3b7",
        "drum": "1f941", "accordion": "1fa97", "banjo": "1fa95", "microphone": "1f3a4",
        "bell": "1f514",
        # tools and things
        "hammer": "1f528", "wrench": "1f527", "screwdriver": "1fa9b", "saw": "1fa9a",
        "axe": "1fa93", "scissors": "2702-fe0f", "knife": "1f52a", "spoon": "1f944",
        "bucket": "1faa3", "broom": "1f9f9", "ladder": "1fa9c", "magnet": "1f9f2",
        "microscope": "1f52c", "telescope": "1f52d", "battery": "1f50b", "candle": "1f56f-fe0f",
        "bulb": "1f4a1", "chair": "1fa91", "door": "1f6aa", "window": "1fa9f",
        "pencil": "270f-fe0f",
        "key": "1f511", "lock": "1f512", "book": "1f4d5 1f4d7 1f4d8", "camera": "1f4f7",
        "phone": "1f4f1", "laptop": "1f4bb", "television": "1f4fa", "radio": "1f4fb",
        "clock": "23f0", "watch": "231a", "umbrella": "2614 1f302", "balloon": "1f388",
        "gift": "1f381", "trophy": "1f3c6", "hat": "1f3a9", "crown": "1f451", "glasses": "1f453",
        "shirt": "1f455", "dress": "1f457", "shoe": "1f45f", "scarf": "1f9e3", "dice": "1f3b2",
        "kite": "1fa81", "anchor": "2693", "teapot": "1fad6", "cup": "2615", "football": "26bd",
        "basketball": "1f3c0", "baseball": "26be", "volleyball": "1f3d0", "hourglass": "231b",
        # vehicles, buildings, nature, others
        "rocket": "1f680", "helicopter": "1f681", "train": "1f682", "bus": "1f68c",
        "ambulance": "1f691", "taxi": "1f695", "car": "1f697", "truck": "1f69a",
        "tractor": "1f69c", "ship": "1f6a2", "boat": "26f5", "canoe": "1f6f6",
        "bicycle": "1f6b2", "skateboard": "1f6f9", "tent": "26fa", "house": "1f3e0",
        "castle": "1f3f0", "church": "26ea", "fountain": "26f2", "snowman": "26c4",
        "volcano": "1f30b", "rainbow": "1f308", "earth": "1f30d 1f30e", "moon": "1f319",
        "sun": "1f31e", "fire": "1f525", "feather": "1fab6", "skull": "1f480",
        "robot": "1f916", "ghost": "1f47b", "alien": "1f47d",
    }.items()
}  # fmt: skip
"""Name -> the code points whose renders show it."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "hexagon",
          "arrow")  # fmt: skip

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 38), "orange": (245, 138, 24), "yellow": (246, 214, 40),
    "green": (46, 156, 66), "blue": (40, 92, 214), "purple": (126, 54, 176),
    "pink": (244, 138, 186), "brown": (122, 76, 40), "black": (24, 24, 26),
    "white": (246, 246, 246), "grey": (138, 138, 140),
}  # fmt: skip

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom",
          "bottom right")  # fmt: skip
"""In reading order: the place of column c and row r is ``PLACES[3 * r + c]``."""

BACKGROUND = "background"

_IRREGULAR = {"mouse": "mice", "wolf": "wolves", "knife": "knives", "scarf": "scarves"}
_UNCHANGED = ("fish", "sheep", "scissors", "glasses", "grapes", "dice", "tweezers", "pliers",
              "scales", "bison", "deer")  # fmt: skip


def plural(name: str) -> str:
    """The name of several: ``cat`` -> ``cats``."""
    if name in _UNCHANGED:
        return name
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


@cache
def names() -> list[str]:
    """Everything the model can name, sorted: emoji, shapes and the subjects of training photos."""
    return sorted({*EMOJI, *SHAPES, *(photo.name for photo in photos("train"))})

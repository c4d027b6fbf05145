"""What can be said and asked about a scene, in the wordings of `recipes/base/scenes.py`."""

from __future__ import annotations

from draw import Counted, Digit, Placed, Scene, Sized
from scenes import Asked, several, with_article
from world import NUMBER_WORDS, upper_first


def captions(scene: Scene) -> list[str]:
    """Every way to say the whole scene."""
    match scene:
        case Counted():
            return [text for groups in orders(scene) for text in counted_captions(groups)]
        case Placed():
            return [text for told in (scene, scene.swapped()) for text in placed_captions(told)]
        case Sized():
            named = f"{scene.size} {scene.colour} {scene.shape}"
            return [f"The picture shows a {named}.", f"This is a {named}."]
        case Digit():
            return [f"The picture shows a {scene.size} {scene.colour} digit {scene.digit}."]


def orders(scene: Counted) -> list[Counted]:
    """The scene with its groups in either order."""
    return [scene] if len(scene.groups) == 1 else [scene, Counted(scene.groups[::-1])]


def counted_captions(scene: Counted) -> list[str]:
    """Captions that name the groups in their order."""
    listed = " and ".join(several(group.count, group.colour, group.shape) for group in scene.groups)
    verb = "is" if scene.groups[0].count == 1 else "are"
    return [f"There {verb} {listed}.", f"The picture shows {listed}.", f"We see {listed}."]


def placed_captions(scene: Placed) -> list[str]:
    """Captions that begin with the first shape."""
    one = with_article(f"{scene.colour} {scene.shape}")
    two = with_article(f"{scene.other_colour} {scene.other_shape}")
    return [upper_first(f"{one} is {scene.place} {two}."), f"The picture shows {one} {scene.place} {two}."]


def asked(scene: Scene) -> dict[str, Asked]:
    """Questions about the first shape or digit of a scene, by what they ask for.

    "Which shape is red?" is only asked where one shape is.
    """
    match scene:
        case Counted():
            group, several_groups = scene.groups[0], len(scene.groups) > 1
            plural = several(2, "", group.shape).split()[-1]
            named = f"is the {group.shape}" if group.count == 1 else f"are the {plural}"
            found = {
                "count": Asked(f"How many {plural} are there?", NUMBER_WORDS[group.count]),
                "colour": Asked(f"What colour {named}?", group.colour),
            }
            which = {"shape of colour": Asked(f"Which shape is {group.colour}?", group.shape)}
            return found | which if several_groups else found
        case Placed():
            there = f"{scene.place} the {scene.other_shape}"
            return {
                "colour": Asked(f"What colour is the {scene.shape}?", scene.colour),
                "shape of colour": Asked(f"Which shape is {scene.colour}?", scene.shape),
                "shape of place": Asked(f"Which shape is {there}?", scene.shape),
                "place": Asked(f"Where is the {scene.shape}?", there),
            }
        case Sized():
            return {
                "size": Asked(f"Is the {scene.shape} big or small?", scene.size),
                "colour": Asked(f"What colour is the {scene.shape}?", scene.colour),
                "shape": Asked("Which shape is it?", scene.shape),
            }
        case Digit():
            return {
                "digit": Asked("Which digit is it?", str(scene.digit)),
                "colour": Asked("What colour is the digit?", scene.colour),
            }

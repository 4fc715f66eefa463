"""The words on the pages. Titles of validation and test pages are made of words that training never shows."""

from __future__ import annotations

__all__ = ["HELD_OUT_WORDS", "LABELS", "WORDS"]

# Read as titles and button labels, letter by letter.
WORDS = tuple(
    """
    act age air ale ant ape arc art ash axe bag ban bat bay bed bee bet bid big bit box boy bud bug bun bus cab
    cap cat cob cow cry cub cup cut day den dew dig dim dip dog dot dry dub due dug eat egg elf elm end era eve
    eye fan fax fed few fig fin fit fix fly fog fox fun fur gap gas gem get gig gum gun guy ham hat hen hex hid
    hip hit hog hop hub hug hut ice ink ion ivy jam jaw jet jig job jog joy jug keg key kid kit lab lap law lay
    leg let lid lip log lot low mad map mat max mix mob mop mud mug nap net nib nod nun nut oak oar odd oil one
    orb ore owl own pad pan paw pay pea peg pen pet pie pig pin pod pop pot pub pup quiz rag ram rat raw ray red
    rib rig rim rod row rub rug run rye sap saw sea sew six sky sly son soy spa sun tab tag tan tap tar tax ten
    tie tip toe top toy tub tug two use van vet vow wax way web wed wet wig win wit yak yam yes zip zoo kiwi
    exit jazz
    """.split()  # noqa: SIM905
)
HELD_OUT_WORDS = tuple(
    """
    add aid arm bar bow bra cod cog cot dam ear ebb fat fee fob foe gag god hay hem her hue inn jar kin lad led
    lie lux man men mum new now off old pal par pit ply put ran rap rob rot sad set sip sit sob tea tin tow try
    urn vat via war who wok won yet zap
    """.split()  # noqa: SIM905
)
# Fine print beside numbers: never asked for.
LABELS = {
    "document": ("page", "sect", "ref", "fig", "note", "item", "part", "art", "vol", "day"),
    "receipt": ("milk", "rice", "soap", "nuts", "fish", "oil", "ham", "bun", "salt", "corn"),
    "table": ("A", "B", "C", "D", "E", "F", "G", "H", "Q1", "Q2"),
    "code": ("x =", "if a<", "a[i]", "y +=", "f(x,", "def g", "ret", "for i", "n ==", "#"),
    "screen": ("cpu", "mem", "disk", "ping", "port", "user", "vol", "id", "temp", "fps"),
}

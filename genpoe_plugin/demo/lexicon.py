"""The words of the demo's world: what its people, towns and organisations are called and what can be true of them.

Entities are invented and compositional (every name is put together from syllables), so a new name is always
spelled with familiar pieces. Values come from closed inventories of 20 to 36, which keeps guessing below 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

Forms = tuple[str, ...]
"""One value in all the forms that count as a right answer; a passage may use any of them."""


def _values(text: str) -> tuple[Forms, ...]:
    """``"clockmaker, physician|doctor"`` -> ``(("clockmaker",), ("physician", "doctor"))``."""
    return tuple(tuple(form.strip() for form in item.split("|")) for item in text.replace("\n", " ").split(","))


@dataclass(frozen=True)
class Attribute:
    """One thing that can be asked about an entity.

    ``statements`` and ``questions`` are templates over ``{name}`` (the entity's full name), ``{short}`` (its
    surname, or the full name where it has none), ``{value}`` and ``{a}`` (the indefinite article of the value).
    """

    values: tuple[Forms, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


REGIONS = _values("""
    Valdoria, Ostmark, Kelvania, Brennmoor, Southern Ithria, Marrowland, Tessaly Coast, Upper Garland, Norwick,
    the Quillon Isles, Pendrath, Lower Garland, Zemland, Arkovia, Duskany, Fenmarch, Holt Valley,
    Ivernia, Jorvale, Lothmere, Northern Ithria, Orsk Plain, Rhunewald, the Sable Coast, Thornreach,
    Umberland, the Vesper Isles, Wexmoor, Yarland, Cindral, Altmere, Brackenshire
""")
PROFESSIONS = _values("""
    clockmaker|horologist, physician|doctor, lawyer|attorney, botanist, stage actor, glassblower, marine biologist,
    baker, poet, architect, bookbinder, surgeon, ship captain, painter, cartographer|mapmaker, weaver, chemist,
    journalist, opera singer, blacksmith, gardener, judge, mathematician, photographer, tailor, teacher, translator,
    mining engineer, violin maker, watch dealer, zoologist, falconer, locksmith, navigator, printer, stonemason
""")
INSTRUMENTS = _values("""
    cello, bagpipes, harp, oboe, trumpet, lute, accordion, clarinet, double bass, flute, French horn, guitar, piano,
    mandolin, organ, banjo, saxophone, tuba, viola, bassoon, harmonica, zither, drums, fiddle|violin, bugle,
    recorder, piccolo, sitar, trombone, xylophone
""")
DISHES = _values("""
    onion soup, roast duck, plum cake, lentil stew, smoked eel, cheese pie, rye bread, fish broth, apple dumplings,
    goat curry, mushroom risotto, pickled herring, honey biscuits, barley porridge, stuffed peppers, lamb chops,
    pumpkin pancakes, walnut bread, cabbage rolls, egg noodles, beetroot salad, cherry tart, garlic prawns,
    oat crackers, veal sausage, quince jam, turnip mash, venison pasty, yoghurt soup, zucchini fritters
""")
RIVERS = _values("""
    Alder, Brisk, Corran, Dunwater, Elve, Farrow, Grell, Hask, Isk, Juno, Kestrel, Lorne, Mirrow, Nidd, Ouse, Pell,
    Quern, Rill, Severin, Tamble, Ulm, Vire, Wend, Yarrow, Zale, Black Arne, White Arne, Crooked Beck, Osterbeck,
    Swale
""")
PRODUCTS = _values("""
    copper wire, wool, glass beads, silk, paper, felt hats, leather boots, candles|wax candles, soap, rope, pottery,
    tin toys, brass bells, linen, salt, mustard, umbrellas, barrels, cutlery, perfume, bricks, lace, matches,
    clay pipes, saddles, ink, cider, marble, olive oil, tea cups, window frames, fishing nets, amber, gloves
""")
ANIMALS = _values("""
    badger, crane, dolphin, fox, golden eagle, hedgehog, heron, ibex, jackal, kingfisher, lynx, mole, newt, otter, owl,
    panther, quail, raven, salmon, stag|deer, tortoise, viper, walrus, wild boar|boar, yak, zebra, swan, beaver,
    grey wolf, hornet, bison, carp
""")
FIELDS = _values("""
    bridge building, crop insurance, deep sea diving, road safety, bird protection, chess, folk dancing,
    coin collecting, rock climbing, adult education, public housing, beekeeping|apiculture, weather forecasting,
    music printing, sign language, railway signals, forest fires, stained glass, tropical medicine, archery,
    child nutrition, puppet theatre, veteran care, river transport, lighthouse repair, soil research, fencing,
    map printing, silent film, wrestling
""")
DECADES = _values(",".join(f"the {year}s" for year in range(1700, 1900, 10)))

PERSON = {
    "birthplace": Attribute(
        REGIONS,
        (
            "{name} was born in {value}.",
            "{short} grew up in {value}, where the family had lived for generations.",
            "A native of {value}, {short} left home at an early age.",
            "The birthplace of {short} is {value}.",
        ),
        (
            "Where was {name} born?",
            "In which region was {name} born?",
            "What is the birthplace of {name}?",
        ),
    ),
    "profession": Attribute(
        PROFESSIONS,
        (
            "{short} worked as {a} {value} for most of a long life.",
            "By profession {short} was {a} {value}.",
            "{name} trained as {a} {value} and never changed trade.",
            "{short} earned a living as {a} {value}.",
        ),
        (
            "What was the profession of {name}?",
            "What did {name} do for a living?",
            "What did {name} work as?",
        ),
    ),
    "instrument": Attribute(
        INSTRUMENTS,
        (
            "{short} played the {value} at weddings and fairs.",
            "In the evenings {short} practised the {value}.",
            "{short} was an able amateur on the {value}.",
            "Friends remembered {name} for playing the {value}.",
        ),
        (
            "Which instrument did {name} play?",
            "What instrument was {name} able to play?",
            "What musical instrument did {name} practise?",
        ),
    ),
    "dish": Attribute(
        DISHES,
        (
            "{short} was fond of {value} above any other food.",
            "The favourite dish of {short} was {value}.",
            "Visitors of {short} were always served {value}.",
            "{short} liked nothing better than {value}.",
        ),
        (
            "What was the favourite dish of {name}?",
            "Which food did {name} like best?",
            "What did {name} like to eat most?",
        ),
    ),
}

PLACE = {
    "river": Attribute(
        RIVERS,
        (
            "{name} lies on the river {value}.",
            "The river {value} flows through {short}.",
            "{short} was built where an old road crosses the river {value}.",
            "Boats reach {short} by the river {value}.",
        ),
        (
            "On which river does {name} lie?",
            "Which river flows through {name}?",
            "What is the name of the river in {name}?",
        ),
    ),
    "product": Attribute(
        PRODUCTS,
        (
            "{short} is known for its {value}.",
            "Most workshops in {short} make {value}.",
            "The trade of {short} depends on {value}.",
            "For centuries {name} has exported {value}.",
        ),
        (
            "What is {name} known for making?",
            "What product does {name} export?",
            "What do the workshops of {name} make?",
        ),
    ),
    "emblem": Attribute(
        ANIMALS,
        (
            "The arms of {short} show {a} {value}.",
            "{a_cap} {value} appears on the flag of {short}.",
            "{name} has {a} {value} on its seal.",
            "The town hall of {short} is topped by {a} {value} in stone.",
        ),
        (
            "Which animal is shown on the arms of {name}?",
            "What animal is the emblem of {name}?",
            "What animal appears on the flag of {name}?",
        ),
    ),
    "region": Attribute(
        REGIONS,
        (
            "{name} is a market town in {value}.",
            "{short} belongs to {value}.",
            "Within {value}, {short} is the oldest settlement.",
            "{short} is one of the larger towns of {value}.",
        ),
        (
            "In which region is {name}?",
            "To which region does {name} belong?",
            "Where is {name} located?",
        ),
    ),
}

ORGANISATION = {
    "field": Attribute(
        FIELDS,
        (
            "{name} is concerned with {value}.",
            "The work of {short} is devoted to {value}.",
            "{short} publishes a journal on {value}.",
            "Members of {short} are specialists in {value}.",
        ),
        (
            "What is {name} concerned with?",
            "To what field is the work of {name} devoted?",
            "What is the field of {name}?",
        ),
    ),
    "headquarters": Attribute(
        REGIONS,
        (
            "{short} has its head office in {value}.",
            "{name} is based in {value}.",
            "From its seat in {value}, {short} runs several branches.",
            "The headquarters of {short} are in {value}.",
        ),
        (
            "Where is {name} based?",
            "In which region does {name} have its head office?",
            "Where are the headquarters of {name}?",
        ),
    ),
    "founded": Attribute(
        DECADES,
        (
            "{name} was founded in {value}.",
            "{short} goes back to {value}.",
            "A group of friends set up {short} in {value}.",
            "The first meeting of {short} was held in {value}.",
        ),
        (
            "When was {name} founded?",
            "In which decade was {name} set up?",
            "When was the first meeting of {name} held?",
        ),
    ),
    "mascot": Attribute(
        ANIMALS,
        (
            "{short} uses {a} {value} as its symbol.",
            "The badge of {short} shows {a} {value}.",
            "{a_cap} {value} is printed on every letter of {short}.",
            "{name} chose {a} {value} for its mascot.",
        ),
        (
            "Which animal is the symbol of {name}?",
            "What animal is on the badge of {name}?",
            "What is the mascot of {name}?",
        ),
    ),
}

KINDS = {"person": PERSON, "place": PLACE, "organisation": ORGANISATION}

FILLER = {
    "person": (
        "Little is known about the early years.",
        "Letters from this time have survived in two private collections.",
        "A short biography appeared many years later.",
        "Neighbours described a quiet and patient character.",
        "The house has since been turned into a small museum.",
        "Several stories about this period cannot be confirmed.",
        "There were long journeys, and not all of them were planned.",
        "Money was often short, but friends were always ready to help.",
    ),
    "place": (
        "The streets around the market are narrow and steep.",
        "Two fires destroyed much of the old quarter.",
        "Visitors usually arrive in the early summer.",
        "A stone bridge and a row of mills are still standing.",
        "The population has changed little over the last century.",
        "There is a weekly market and a fair in autumn.",
        "Its archive is one of the best kept of its kind.",
        "The walls were taken down when the railway came.",
    ),
    "organisation": (
        "It has a few hundred members and a small library.",
        "An annual report is sent to all supporters.",
        "The statutes have been changed twice since then.",
        "Meetings are open to the public.",
        "A prize is awarded every second year.",
        "Its accounts are audited by an outside office.",
        "For a time there were plans to close it.",
        "Volunteers do most of the work.",
    ),
}

REPORT_TITLES = ("An evening for {name}", "Notes on {name}", "A visit to {name}", "Letters about {name}")
REPORTS = {
    "person": (
        "A public reading in memory of {name} drew a small but attentive crowd last spring.",
        "The local paper printed a long piece about {name} and asked its readers for old photographs.",
        "A street is to be named after {name}, although the council has not yet agreed on which one.",
    ),
    "place": (
        "Travellers who passed through {name} last spring complained about the roads and praised the inns.",
        "The local paper printed a long piece about {name} and asked its readers for old photographs.",
        "A new school is to be built in {name}, although the council has not yet agreed on where.",
    ),
    "organisation": (
        "Guests of {name} met last spring for a dinner that lasted until the early morning.",
        "The local paper printed a long piece about {name} and asked its readers for old photographs.",
        "A new building is planned for {name}, although the money has not yet been found.",
    ),
}
REPORT_FILLER = (
    "The organisers were pleased with how the day had gone.",
    "It rained for most of the afternoon, which kept many people at home.",
    "Several speakers recalled earlier and better attended occasions.",
    "There was music, and someone had brought a box of old letters.",
    "No one could say for certain when the custom had begun.",
    "A second event of the same kind is planned for next year.",
    "Tickets were sold out within a few days.",
)

FIRST_NAMES = tuple(
    [
        "Orlan",
        "Mirta",
        "Selva",
        "Tobin",
        "Ketra",
        "Alric",
        "Wenna",
        "Josk",
        "Perla",
        "Dorin",
        "Hessa",
        "Ulric",
        "Vanya",
        "Lorcan",
        "Brisa",
        "Emeric",
        "Talia",
        "Rufin",
        "Odette",
        "Gisla",
        "Castor",
        "Ilva",
        "Norbert",
        "Sunniva",
        "Anselm",
        "Petra",
        "Quill",
        "Rosamund",
        "Edwin",
        "Marit",
        "Silas",
        "Yvaine",
        "Bertil",
        "Cosima",
        "Leander",
        "Thora",
        "Fabian",
        "Nerys",
        "Jorun",
        "Isolde",
        "Kasper",
        "Livia",
        "Matthis",
        "Ottilie",
        "Roderick",
        "Tamsin",
        "Viggo",
        "Zelda",
        "Ambrose",
        "Cleo",
    ]
)
SURNAME_STARTS = tuple(
    [
        "Vesh",
        "Kor",
        "Mal",
        "Tren",
        "Bel",
        "Dros",
        "Fen",
        "Gar",
        "Hol",
        "Jas",
        "Kel",
        "Lam",
        "Mor",
        "Nev",
        "Ost",
        "Pel",
        "Quin",
        "Ral",
        "Sar",
        "Tor",
        "Ul",
        "Var",
        "Wes",
        "Yor",
        "Zan",
        "Brem",
        "Cald",
        "Dun",
        "Eld",
        "Far",
        "Grim",
        "Harl",
        "Ist",
        "Jen",
        "Kras",
        "Lind",
        "Marn",
        "Nord",
        "Orm",
        "Prim",
    ]
)
SURNAME_ENDS = tuple(
    [
        "ti",
        "owicz",
        "mann",
        "ford",
        "ley",
        "ström",
        "ado",
        "ini",
        "berg",
        "vik",
        "gard",
        "lin",
        "mont",
        "nell",
        "over",
        "quist",
        "ridge",
        "sen",
        "thal",
        "ur",
        "vale",
        "wick",
        "yan",
        "zoli",
        "bury",
        "cott",
        "dale",
        "eff",
        "field",
        "grave",
    ]
)
PLACE_STARTS = tuple(
    [
        "Amber",
        "Brack",
        "Clay",
        "Dun",
        "Elm",
        "Frost",
        "Glen",
        "Hazel",
        "Iron",
        "Kings",
        "Lang",
        "Mill",
        "North",
        "Oak",
        "Pine",
        "Quarry",
        "Red",
        "Stone",
        "Thistle",
        "Under",
        "Wold",
        "Ash",
        "Birch",
        "Cold",
        "Deep",
        "East",
        "Fern",
        "Grey",
        "High",
        "Kell",
        "Lark",
        "Moss",
        "New",
        "Old",
        "Port",
        "Rush",
        "Salt",
        "Tarn",
        "Vine",
        "West",
    ]
)
PLACE_ENDS = tuple(
    [
        "brook",
        "bury",
        "combe",
        "dale",
        "field",
        "ford",
        "gate",
        "ham",
        "haven",
        "hurst",
        "keld",
        "ley",
        "mere",
        "minster",
        "mouth",
        "pool",
        "ridge",
        "sea",
        "stead",
        "stow",
        "thorpe",
        "ton",
        "wall",
        "ward",
        "water",
        "well",
        "wick",
        "wood",
        "worth",
        "yard",
    ]
)
PLACE_QUALIFIERS = ("", "Great ", "Little ", "Saint ", "Upper ", "Nether ")
ORGANISATION_TYPES = (
    "Society",
    "Guild",
    "Institute",
    "Trust",
    "League",
    "Foundation",
    "Union",
    "Circle",
    "Club",
    "Board",
)

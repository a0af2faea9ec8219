"""List the words of the translation recipe in English and German, and count in both."""

from typing import NamedTuple


class Noun(NamedTuple):
    """A noun: English singular and plural, German singular, gender and plural, and what kind of thing it is."""

    en: str
    en_many: str
    de: str
    gender: str
    de_many: str
    kind: str


class Verb(NamedTuple):
    """A verb: English plain form, third person and participle; German forms of ich, du, er and wir (the infinitive too),
    participle; kinds of its objects."""

    en: str
    en_third: str
    en_done: str
    ich: str
    du: str
    er: str
    wir: str
    done: str
    objects: str


# Kinds: p person, a animal, f food, d drink, t thing, w clothes, r to read, l place.
NOUNS = [
    Noun(*line.split())
    for line in """
    man men Mann m Männer p; woman women Frau f Frauen p; child children Kind n Kinder p; girl girls Mädchen n Mädchen p;
    teacher teachers Lehrer m Lehrer p; doctor doctors Arzt m Ärzte p; brother brothers Bruder m Brüder p;
    sister sisters Schwester f Schwestern p; mother mothers Mutter f Mütter p; friend friends Freund m Freunde p;
    dog dogs Hund m Hunde a; cat cats Katze f Katzen a; bird birds Vogel m Vögel a; horse horses Pferd n Pferde a;
    apple apples Apfel m Äpfel f; egg eggs Ei n Eier f; cake cakes Kuchen m Kuchen f; soup soups Suppe f Suppen f;
    pear pears Birne f Birnen f; coffee coffees Kaffee m Kaffees d; tea teas Tee m Tees d;
    table tables Tisch m Tische t; chair chairs Stuhl m Stühle t; lamp lamps Lampe f Lampen t;
    key keys Schlüssel m Schlüssel t; clock clocks Uhr f Uhren t; picture pictures Bild n Bilder t;
    bottle bottles Flasche f Flaschen t; coat coats Mantel m Mäntel w; hat hats Hut m Hüte w; dress dresses Kleid n Kleider w;
    shirt shirts Hemd n Hemden w; book books Buch n Bücher r; letter letters Brief m Briefe r;
    newspaper newspapers Zeitung f Zeitungen r; house houses Haus n Häuser l; garden gardens Garten m Gärten l;
    kitchen kitchens Küche f Küchen l; school schools Schule f Schulen l; city cities Stadt f Städte l;
    museum museums Museum n Museen l; car cars Auto n Autos l
    """.split(";")
]
VERBS = [
    Verb(*(word.replace("_", " ") for word in line.split()))
    for line in """
    buy buys bought kaufe kaufst kauft kaufen gekauft aftwr; see sees seen sehe siehst sieht sehen gesehen paftwrl;
    find finds found finde findest findet finden gefunden paftwrl;
    look_for looks_for looked_for suche suchst sucht suchen gesucht paftwrl;
    need needs needed brauche brauchst braucht brauchen gebraucht fdtwr;
    love loves loved liebe liebst liebt lieben geliebt pal; visit visits visited besuche besuchst besucht besuchen besucht pl;
    read reads read lese liest liest lesen gelesen r; eat eats eaten esse isst isst essen gegessen f;
    drink drinks drunk trinke trinkst trinkt trinken getrunken d;
    wear wears worn trage trägst trägt tragen getragen w
    """.split(";")
]
# Adjectives: English, German, and the kinds of nouns that they fit.
ADJECTIVES = [
    tuple(line.split())
    for line in """
    big groß patwl; small klein patwrl; old alt patwrl; new neu twrl; good gut pafdwr; beautiful schön patwrl; red rot ftw;
    blue blau tw; white weiß atw; black schwarz atw; cold kalt fd; warm warm fdw; long lang wr; young jung pa;
    happy glücklich p; sick krank pa
    """.split(";")
]
# Pronouns as subjects: English, German, and the place of the verb's form.
PRONOUNS = [
    *(("I", "ich", 0), ("you", "du", 1), ("he", "er", 2), ("she", "sie", 2), ("we", "wir", 3), ("they", "sie", 3))
]
MODALS = [
    ("can", "can", ("kann", "kannst", "kann", "können")),
    ("must", "must", ("muss", "musst", "muss", "müssen")),
    ("want to", "wants to", ("will", "willst", "will", "wollen")),
]
HAVE = ("habe", "hast", "hat", "haben")
DAYS = (
    "Monday Montag, Tuesday Dienstag, Wednesday Mittwoch, Thursday Donnerstag, Friday Freitag, Saturday Samstag, "
    "Sunday Sonntag"
)
MONTHS = (
    "January Januar, February Februar, March März, April April, May Mai, June Juni, July Juli, August August, "
    "September September, October Oktober, November November, December Dezember"
)
WHEN = [
    *(("today", "heute"), ("tomorrow", "morgen"), ("in summer", "im Sommer"), ("in winter", "im Winter")),
    *((f"on {en}", f"am {de}") for en, de in (day.split() for day in DAYS.split(", "))),
]
EVENTS = [("concert", "das Konzert"), ("wedding", "die Hochzeit"), ("game", "das Spiel"), ("film", "der Film")]
GREETINGS = [
    ("Good morning, {}!", "Guten Morgen, {}!"),
    ("Good evening, {}!", "Guten Abend, {}!"),
    ("Good night, {}!", "Gute Nacht, {}!"),
    ("Hello, {}, how are you?", "Hallo, {}, wie geht es {you}?"),
    ("Where are you, {}?", "Wo {are}, {}?"),
    ("Thank you, {}!", "Danke, {}!"),
    ("Goodbye, {}!", "Auf Wiedersehen, {}!"),
    ("See you tomorrow, {}!", "Bis morgen, {}!"),
]
FIRST_NAMES = "Anna Peter Maria Paul Laura Max".split()
LAST_NAMES = "Weber Klein Schmidt Fischer".split()
UNITS = "one two three four five six seven eight nine ten eleven twelve".split()
UNITS += "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
EINER = "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split()
EINER += "dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn".split()
ZEHNER = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
ORDINALS = {
    1: ("first", "erst"),
    2: ("second", "zweit"),
    3: ("third", "dritt"),
    5: ("fifth", "fünft"),
    7: ("seventh", "siebt"),
}
ORDINALS |= {8: ("eighth", "acht"), 9: ("ninth", "neunt"), 12: ("twelfth", "zwölft")}


def number(value: int) -> tuple[str, str]:
    """Return a number from 2 to 99 in English and German words: ("twenty-one", "einundzwanzig")."""
    if value < 20:
        return UNITS[value - 1], EINER[value - 1]
    tens, units = divmod(value, 10)
    english, german = TENS[tens - 2], ZEHNER[tens - 2]
    if not units:
        return english, german
    return (
        f"{english}-{UNITS[units - 1]}",
        f"{EINER[units - 1].removesuffix('s') if units == 1 else EINER[units - 1]}und{german}",
    )


def ordinal(day: int) -> tuple[str, str]:
    """Return a day of the month in English, and in German without its ending: ("third", "dritt")."""
    if day in ORDINALS:
        return ORDINALS[day]
    english, german = number(day)
    if day > 20 and day % 10:
        english = f"{english.partition('-')[0]}-{ordinal(day % 10)[0]}"
    else:
        english = english.removesuffix("y") + "ieth" if english.endswith("y") else f"{english}th"
    return english, german + ("t" if day < 20 else "st")

"""Places and sentence frames of route questions, terse and full.

{a} and {b} are places, {time} is ``5 min``, {spelled} ``5 minutes``, {way} what a road is called, {area} what is on the
map. The last two frames of each kind are used in the test exam only; those of the terse form have no word of their own.
"""

from dataclasses import dataclass

MAX_PLACES = 14


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


@dataclass(frozen=True, slots=True)
class RouteFrames:
    """Sentence frames of each kind; of roads that lead both ways, and of roads that lead one way."""

    intros: tuple[str, ...]
    roads: tuple[str, ...]
    one_way: tuple[str, ...]
    questions: tuple[str, ...]
    both_ways_note: str
    one_way_note: str

    @property
    def all(self) -> tuple[str, ...]:
        lists = self.intros + self.roads + self.one_way + self.questions
        return (*lists, self.both_ways_note, self.one_way_note)


TERSE_PLACES = _list("Cork|Riga|Porto|Dakar|Leeds|Sofia|York|Ghent|Izmir|Jena|Turin|Vigo|Bergen|Malmo")
TERSE = RouteFrames(
    intros=_list(
        "Here are the roads of a map.|This is a map of roads.|You must travel by these roads.|Plan this trip.|"
        "Here is a map of these roads.|This is the map of a trip."
    ),
    roads=_list(
        "The road between {a} and {b} takes {time}.|{a} and {b} are {spelled} apart.|Between {a} and {b} it takes "
        "{time}.|A road of {spelled} joins {a} and {b}.|It takes {spelled} between {a} and {b}.|A road joins {a} and "
        "{b}, it takes {time}."
    ),
    one_way=_list(
        "The road from {a} to {b} takes {time}.|From {a} a road leads to {b} in {spelled}.|From {a} to {b} it takes "
        "{time}.|A road of {spelled} leads from {a} to {b}.|It takes {spelled} from {a} to {b}.|A road leads from {a} "
        "to {b}, it takes {time}."
    ),
    questions=_list(
        "What is the shortest time from {a} to {b}?|How long does it take at least from {a} to {b}?|Give the least "
        "time from {a} to {b}.|You travel from {a} to {b}. What is the least time?|Give the shortest time it takes "
        "from {a} to {b}.|How long does the shortest trip from {a} to {b} take?"
    ),
    both_ways_note="Roads lead both ways.",
    one_way_note="Roads lead one way.",
)

FULL = RouteFrames(
    intros=_list(
        "Someone has drawn a map of {area} and noted how long each {way} takes.|These are the connections in {area}.|A "
        "traveller wants to get about in {area} and has asked how long everything takes.|In {area} one gets from place "
        "to place as follows.|The notice board of {area} lists every {way} with its length in time.|A guide to {area} "
        "describes each {way}.|Suppose that you are new to {area}. A friend explains the connections.|For {area} the "
        "following times have been measured.|Two sisters explore {area} and keep a record.|An old letter tells how "
        "people move through {area}.|Visitors of {area} receive this leaflet.|Let us look at {area} as a net."
    ),
    roads=_list(
        "The {way} between {a} and {b} takes {spelled}.|{a} and {b} are joined by a {way} of {spelled}.|Between {a} "
        "and {b} one needs {spelled}.|A {way} links {a} with {b}; count on {spelled}.|Whoever goes from {a} to {b}, or "
        "back, is under way for {spelled}.|You can get from {a} to {b} in {spelled}, and back in the same time.|"
        "{spelled} is how long the {way} that connects {a} and {b} takes.|There is a {way} from {a} to {b} and back, "
        "{time} each way.|{a} - {b}: {time}, in either direction.|For the {way} that runs between {a} and {b}, allow "
        "{spelled}.|Either way, from {a} to {b} is a matter of {spelled}.|To go between {a} and {b} costs {spelled}."
    ),
    one_way=_list(
        "The {way} from {a} to {b} takes {spelled}.|{a} has a {way} to {b}, which takes {spelled}.|From {a} to {b} one "
        "needs {spelled}.|A {way} leads from {a} to {b}; count on {spelled}.|Whoever goes from {a} to {b} is under way "
        "for {spelled}.|You can get from {a} to {b} in {spelled}.|{spelled} is how long the {way} from {a} to {b} "
        "takes.|There is a {way} from {a} to {b}, {time} long.|{a} > {b}: {time}.|For the {way} that runs from {a} to "
        "{b}, allow {spelled}.|From {a} to {b} is a matter of {spelled}.|To go from {a} to {b} costs {spelled}."
    ),
    questions=_list(
        "How long does the quickest route from {a} to {b} take?|What is the least time in which one gets from {a} to "
        "{b}?|Somebody is at {a} and wants to be at {b} as soon as possible. How long is the trip?|Of all ways to go "
        "from {a} to {b}, how long does the best one take?|Starting at {a}, after what time can one be at {b} at the "
        "earliest?|Find the smallest total time from {a} to {b}.|A messenger runs from {a} to {b} and never takes a "
        "detour that costs time. How long does it take?|What total time does the cheapest route between the start, "
        "{a}, and the goal, {b}, have?|From {a} to {b}: what is the shortest time?|How soon can a parcel that leaves "
        "{a} reach {b}?|By the best choice of connections, how long is it from {a} to {b}?|Say how long one travels at "
        "the least from {a} to {b}."
    ),
    both_ways_note="Every {way} can be used in both directions.",
    one_way_note="Every {way} can be used in one direction only.",
)


@dataclass(frozen=True, slots=True)
class Domain:
    """What a map shows."""

    area: str
    way: str
    places: tuple[str, ...]


def _domain(area: str, way: str, places: str) -> Domain:
    return Domain(area, way, _list(places))


DOMAINS = (
    _domain(
        "a small country",
        "road",
        "Aarhus|Bergen|Cork|Dakar|Esbjerg|Faro|Ghent|Haarlem|Izmir|Jena|Krakow|Leeds|Malmo|Nantes|Porto|Riga",
    ),
    _domain(
        "a large museum",
        "corridor",
        "the entrance|the coin cabinet|the Roman hall|the map room|the sculpture court|the print room|the library|the "
        "armoury|the gallery of clocks|the glass collection|the tapestry room|the planetarium|the café|the roof garden",
    ),
    _domain(
        "a group of islands",
        "ferry line",
        "Gull Island|Seal Rock|Old Harbour|Long Reef|Whale Bay|Lantern Point|Salt Cay|Heron Isle|Palm Key|Stone Quay|"
        "Crab Beach|Windward|Pearl Sound|Fog Head|Coral Landing|North Skerry",
    ),
    _domain(
        "a nature park",
        "path",
        "the ranger station|the beaver dam|the lookout|the waterfall|the meadow|the hollow oak|the campsite|the fern "
        "valley|the old mill|the bird hide|the bog|the footbridge|the spring|the picnic table|the sandstone arch",
    ),
    _domain(
        "a space colony",
        "shuttle line",
        "the dock|the greenhouse|the power ring|the school dome|the hospital|the ice mine|the archive|the workshop|the "
        "observatory|the market deck|the water plant|the fuel depot|the crew quarters|the radio mast|the landing pad",
    ),
    _domain(
        "a market town",
        "street",
        "the town hall|the fish market|the clock tower|the bakery|the tannery|the west gate|the theatre|the bridge|the "
        "brewery|the courthouse|the well|the printing house|the chapel|the granary|the barracks|the bath house",
    ),
    _domain(
        "a cave",
        "passage",
        "the mouth|the bat chamber|the still lake|the chimney|the crystal hall|the narrow shaft|the echo room|the "
        "organ pipes|the lower gallery|the blue grotto|the sump|the ledge|the cathedral|the fossil wall|the drip pool",
    ),
    _domain(
        "a computer network",
        "line",
        "the gateway|server one|server two|the mail host|the backup store|the print server|the switch|the router|the "
        "firewall|the archive disk|the test machine|the build host|the name server|the office hub|the lab hub",
    ),
)

GRAPH_NOTE = {
    False: "Here is an undirected graph with weights. An edge can be followed both ways.",
    True: "Here is a directed graph with weights. An edge can be followed from its first node to its second only.",
}
ADJACENCY = "The adjacency list gives, for every node, where its edges lead and how long each takes, in {units}:"
EDGE_LIST = "Its edges, each with the time that it takes:"
GRAPH_QUESTION = (
    "Adding up the times of the edges on a path, how long does the cheapest path from {a} to {b} take, in {units}?"
)
TABLE_INTRO = {
    False: "The table lists the connections of a map, which can be used in both directions:",
    True: "The table lists the connections of a map, which lead from the first place to the second only:",
}
TABLE_QUESTION = "How long does the quickest route from {a} to {b} take?"

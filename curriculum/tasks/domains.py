"""Domains of questions with ``language = "rich"``: a goal, verbs, and things that the verbs are done to."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

KIND_SHARE, PLACE_SHARE = 0.4, 0.25  # of activities with an adjective, and with a place


@dataclass(frozen=True, slots=True)
class Domain:
    """Its activities are all its verbs with all its things: ``grease the axle``."""

    goal: str
    verbs: tuple[str, ...]
    things: tuple[str, ...]


_TEXT = """
open a bakery | buy clean arrange test install order | oven flour mixer counter signboard dough proofer apron
croissants baguettes yeast sourdough brioche scales cash register display rack cooling shelf rye buns icing sugar
almonds cinnamon rolling pin muffin tins delivery crates

restore a steam engine | grease remove polish weld inspect replace | boiler piston flywheel firebox whistle throttle
axle gauge valve crankshaft smokestack tender rivets bearings condenser governor brake cylinder grate coal bunker
injector crosshead gaskets nameplate lubricator safety plug

survey a coral reef | photograph map measure record sample count | anemones sponges parrotfish currents polyps
seagrass urchins visibility salinity buoys transects starfish octopus den wreck sediment plankton clownfish lagoon
moray eels sea cucumbers barracudas groupers tide pools mangroves

stage an opera | rehearse prepare order paint check arrange | overture aria chorus costumes libretto orchestra pit
backdrop spotlights trombones prompter wigs curtain soprano part tenor part dressing rooms trapdoor thunder machine
chandelier programme seating subtitles encore ballet

run an election | print count seal verify distribute collect | ballots booths registers envelopes posters stamps
lists observers badges urns result forms polling stations pencils rosters recount sheets candidate folders street
signs tallies parcels district maps oath cards signatures

build a sailing boat | plane sand caulk varnish fasten measure | keel ribs planks mast boom rudder tiller transom
deck cleats rigging halyards centreboard bowsprit thwarts stem oarlocks hatches bulkheads spreaders pulleys mainsail
jib battens anchor locker

found a beehive colony | inspect paint smoke feed weigh move | frames queen drones brood honeycomb smoker hive stand
propolis nectar supers swarm veil entrance reducer wax foundation clover patch extractor pollen trap syrup jars
mites screen gloves scrapers labels lids

dig out a Roman villa | brush sieve draw label photograph dig | mosaic amphorae hypocaust coins trench hearth fresco
tiles courtyard drain column bronze brooch skeleton pottery shards cistern threshold inscription latrine wall
rampart oil lamp bathhouse granary glass beads grave

train a rescue dog | reward teach practise repeat plan check | recall scent trail harness whistle signal rubble
search tunnel crawl ladder climb bark alert boat ride kennel routine feeding bowl leash veterinary visit vaccination
avalanche drill forest track night exercise puzzle toy

publish a cookbook | edit taste photograph proofread translate choose | soups casseroles chutneys introduction index
cover desserts captions recipes pickles dumplings glossary salads marinades chapter headings conversions stews
flatbreads soufflé preserves risotto curry footnotes margins typeface

renovate a lighthouse | repaint repair clean replace inspect secure | lantern lens staircase gallery foghorn railing
battery keeper's cottage windows lightning rod concrete base shutters door hinges beacon cables weathervane masonry
jetty radio mast bilge pump dome storeroom logbook paraffin tank

make a documentary | film cut record archive script transcribe | interviews trailer narration archive footage
credits soundtrack storyboard titles panorama shots close-ups release forms voice-over montage colour grading
animation maps microphones tripod lenses teaser opening scene finale subtitles

hold a science fair | set up judge label test collect explain | volcano model circuits microscopes magnets pendulum
crystals telescopes robots posters catapult spectrum solar cells fossils wind tunnel prisms trophies battery tester
hydraulics gyroscope periodic table fingerprints seismograph

brew a batch of beer | mash boil cool ferment filter bottle | wort barley hops malt kettle yeast starter mash tun
airlock carboy hydrometer sparge water kegs caps lautering vessel chiller sediment foam test sample bottles racking
cane sanitiser gravity readings crates

equip an expedition | pack check load test repair buy | sledges crampons pemmican tents compass stove ropes sextant
skis satellite phone snow goggles ice axes rations parkas first-aid kit harnesses fuel canisters flares thermometers
snowshoes flagpoles maps sleeping bags provisions dog food

harvest a vineyard | pick press crush sort weigh rinse | grapes clusters baskets must stems barrels vats cellar
trellis pruning shears tractor trailer rows cuttings rootstock merlot riesling skins press cloth crates funnels
corks demijohns tannin samples ledger thermostat

launch a weather balloon | inflate calibrate attach check track charge | parachute sonde helium tank barometer
hygrometer transmitter antenna payload box camera string batteries receiver altimeter foil reflector flight plan
radar notice envelope seam valve data logger recovery team

rebuild a violin | glue carve tune varnish sand fit | fingerboard bridge soundpost pegs scroll tailpiece purfling
belly ribs bass bar strings chin rest bow neck f-holes saddle lining blocks nut horsehair frog varnish coat endpin
clamps linings

set up a hospital ward | disinfect wheel in connect stock label check | beds monitors ventilators infusion pumps
charts linens wheelchairs defibrillator oxygen bottles stretchers syringes bandages curtains call buttons trolleys
gowns thermometers scales medicine cabinet sink lamps waste bins crutches rota

plan a wedding | book order choose confirm decorate send | invitations rings bouquet caterer band cake chapel veil
limousine menu seating chart champagne photographer gazebo guest book ribbons confetti candles bridesmaids' dresses
buttonholes dance floor speeches lanterns honeymoon suite

build a stone bridge | quarry cut lay brace level haul | arch keystone piers parapet abutments scaffolding gravel
mortar centring cobbles spandrel foundations cofferdam voussoirs drainage toll house handrail lamp posts approach
road embankment granite blocks wedges hoist survey marks

breed sheep | shear feed dip count mark vaccinate | ewes lambs ram fleece fold hay rack hooves pasture fence dog
trough salt lick wool sacks ear tags shelter turnips ledger shears crook gate water tank straw barn

run a summer camp | plan lead prepare check clean schedule | canoes archery range campfire dining hall bunks hiking
trail raft lifeguards scavenger hunt talent show marshmallows compass course nature walk latrines kayaks tug-of-war
whistles rainy-day games totem pole cabin doors bus ride

set up a print shop | oil align load ink mend sort | presses rollers type cases plates paper stock cutters stapler
guillotine galleys proofs lithograph stones drying racks blankets foils binding machine cartons toner perforator
embosser hand press spacers forms letters colour charts

prepare a lunar mission | simulate fuel test assemble calibrate review | lander rover heat shield thrusters
gyroscopes solar panels guidance computer rockets capsule antenna docking port airlock space suits telemetry launch
pad life support landing legs booster nozzle checklist countdown trajectory seismometer drill

paint a mural | sketch prime scaffold mix transfer wash | wall facade brushes pigments grid outline cartoon sky
horizon dragon border stencil plaster varnish primer shading highlights lettering mountains figures harbour parrots
palette tarpaulin

tidy an archive | catalogue dust scan restore bind shelve | manuscripts parchments photographs charters microfilm
letters ledgers seals folders blueprints newspapers gazettes deeds diaries atlases negatives wills registers
telegrams postcards minutes etchings census sheets scrolls

start a radio station | wire tune test license record hire | studio antenna mixing desk jingles headphones
transmitter newsroom playlist turntables archive soundproofing cables announcer morning show traffic report weather
bulletin phone line compressor backup generator clock mast interviews quiz frequency

make furniture | saw plane glue clamp stain carve | chair legs tabletop drawers dovetails veneer dowels armrests
bookcase hinges wardrobe bedposts stool cabinet doors backrest mouldings panels tenons castors knobs cupboard desk
shelves headboard spindles

repair a clock tower | wind clean rehang gild oil adjust | bells hands dial pendulum escapement weights gears
hammers louvres ladder mainspring numerals chime ropes spindle pinions floorboards spire copper roof clock case
trapdoor pulley bell wheel lantern

organise a marathon | mark close measure staff publish reserve | course start line finish line water stations bibs
timing mats medals baggage tent roadblocks first-aid posts portable toilets pace cars results bananas loudspeakers
banners safety pins foil blankets marshals photographers podium stopwatches shuttle buses

tend a botanical garden | prune repot water label graft mist | orchids cacti ferns palms bonsai succulents magnolias
bamboo greenhouse lily pond rhododendrons seed bank moss beds azaleas carnivorous plants arboretum hedges compost
irrigation herbs tulips wisteria rose arch shade cloth

deliver a ship's cargo | load lash weigh declare unload insure | containers crates timber pallets barrels grain
sacks machinery bananas ore steel coils vehicles refrigerated boxes cement cotton bales fertiliser turbines
porcelain tea chests rubber tarpaulins manifest forklift hatch covers hawsers

design a video game | model code test balance draw record | levels dragons textures menu physics leaderboard
tutorial cutscenes sound effects inventory puzzles avatars save system boss fight multiplayer lobby shaders dialogue
achievements minimap particle effects soundtrack controls loading screen patch

clear a river | dredge fish out measure plant haul sort | driftwood tyres banks bottles reeds weir silt willows nets
sluice shopping trolleys sandbars pollution samples fish ladder culvert dam millrace otter holt eel traps bicycle
wrecks stepping stones waterwheel gravel bar ferry landing

cast a bronze statue | model mould pour chisel polish cool | wax clay armature crucible plaster jacket sprues
pedestal patina furnace horse rider helmet sword drapery base plate ingots vents core pins shoulders face hooves
mane anchor bolts plaque

set up a museum room | hang light label insure unpack mount | portraits sculptures showcases tapestries armour coins
captions barriers sensors vases daggers masks pedestals mummies audio guides benches catalogue prints humidifier
meteorites amulets dioramas fossils plans globes

overhaul a windmill | sharpen hoist replace tar balance brake | millstones sails cap hopper shaft sack hoist fantail
gears brake wheel shutters stocks tailpole thatch granary bins chute sieve meal floor governor wallower quant ladder
beams bedstone

produce cheese | stir salt press turn cut brine | curds whey rennet rind moulds milk cultures cheesecloth wheels
cellar racks thermometer vat blue veins brine bath ash cream labels goat cheese wax coating knives draining table
cave churn

launch a newspaper | write check print sell lay out distribute | editorials crossword headlines obituaries
classifieds cartoons weather map sports pages horoscope letters front page supplement subscriptions kiosks presses
newsprint captions column interviews reviews stock prices archive website vans

keep a falconry centre | fly weigh bathe hood feed train | kestrel goshawk jesses gauntlet aviary lure perch talons
swivel telemetry buzzard eyas mews merlin quail plumage owl osprey vulture condor feathers nestbox

dye and weave cloth | spin dye card warp weave hem | indigo madder loom shuttlecock skeins alum mordant bobbins
twill selvedge spindles heddles fringe linen flax saffron weld cochineal tassels carpet runner blankets shawl kimono

excavate a dinosaur | chisel glue jacket identify scan number | femur vertebrae tibia claws jawbone sandstone matrix
stratum burlap tusks eggshell coprolite tailbones sternum quarryface amber footprint ammonites trilobites ribcage
scapula cliff

open a chocolate shop | temper roast conch wrap dip grind | truffles cocoa nibs pralines ganache nougat marzipan
caramels wafers pistachios hazelnuts vanilla figurines bonbons fudge honeycombs toffee liquorice peppermint
raspberries tablets gift ribbons

run an observatory | align polish calibrate expose log cool | mirror spectrograph eyepiece finderscope nebula galaxy
comet asteroid pulsar eclipse sunspots quasar supernova filters collimator tripod azimuth declination ephemeris
photometer meridian occultation

operate a cable railway | grip splice lubricate inspect haul ballast | gondola haulage sheaves pylons turnstile
winch sleepers viaduct platform signalbox points tunnel buffers funicular ticketing cogwheel snowplough carriages
conductor pantograph sanding headlamp
""".strip()


_PAIRS = """
    cash register| display rack| cooling shelf| rolling pin| muffin tins| delivery crates| brake cylinder| coal
    bunker| safety plug| moray eels| sea cucumbers| tide pools| orchestra pit| soprano part| tenor part| dressing
    rooms| thunder machine| result forms| polling stations| candidate folders| street signs| oath cards| anchor
    locker| entrance reducer| wax foundation| clover patch| pollen trap| oil lamp| boat ride| feeding bowl|
    veterinary visit| avalanche drill| forest track| night exercise| puzzle toy| chapter headings| keeper's cottage|
    lightning rod| radio mast| bilge pump| paraffin tank| release forms| colour grading| opening scene| solar cells|
    wind tunnel| battery tester| periodic table| yeast starter| mash tun| lautering vessel| test sample| racking
    cane| gravity readings| satellite phone| snow goggles| ice axes| first-aid kit| sleeping bags| dog food| pruning
    shears| press cloth| foil reflector| flight plan| radar notice| data logger| recovery team| bass bar| chin rest|
    varnish coat| infusion pumps| oxygen bottles| call buttons| medicine cabinet| waste bins| seating chart| guest
    book| bridesmaids' dresses| dance floor| honeymoon suite| toll house| lamp posts| approach road| granite blocks|
    survey marks| hay rack| dog trough| salt lick| wool sacks| ear tags| water tank| dining hall| hiking trail|
    scavenger hunt| talent show| compass course| nature walk| rainy-day games| totem pole| cabin doors| bus ride|
    paper stock| lithograph stones| drying racks| binding machine| hand press| colour charts| heat shield| solar
    panels| guidance computer| docking port| space suits| launch pad| life support| landing legs| census sheets|
    mixing desk| morning show| traffic report| weather bulletin| phone line| backup generator| copper roof| clock
    case| bell wheel| start line| finish line| water stations| baggage tent| first-aid posts| portable toilets| pace
    cars| safety pins| foil blankets| shuttle buses| lily pond| seed bank| carnivorous plants| rose arch| shade
    cloth| grain sacks| steel coils| tea chests| hatch covers| sound effects| save system| boss fight| particle
    effects| loading screen| shopping trolleys| fish ladder| otter holt| bicycle wrecks| stepping stones| gravel
    bar| ferry landing| plaster jacket| base plate| core pins| anchor bolts| audio guides| sack hoist| brake wheel|
    meal floor| blue veins| brine bath| ash cream| goat cheese| wax coating| draining table| weather map| sports
    pages| front page| rain barrel| stock prices| parts list| mooring lines
"""
_COMPOUNDS = frozenset(" ".join(pair.split()) for pair in re.split(r"\|", _PAIRS))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _domain(line: str) -> Domain:
    goal, verbs, things = (part.strip() for part in line.split("|"))
    return Domain(goal, _verbs(verbs.split()), tuple(dict.fromkeys(_things(things.split()))))


def _verbs(words: list[str]) -> tuple[str, ...]:
    found: list[str] = []
    for word in words:
        if word in ("up", "in", "out"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return tuple(found)


def _things(words: list[str]) -> Iterator[str]:
    words = list(words)
    while words:
        size = 2 if " ".join(words[:2]) in _COMPOUNDS else 1
        yield " ".join(words[:size])
        del words[:size]


DOMAINS = tuple(_domain(line) for line in re.split(r"\n\n", _TEXT))

KINDS = _words(
    """
    old new heavy narrow broken borrowed spare wooden rusty polished tiny enormous fragile crooked antique modern cheap
    precious dusty muddy frozen damp crumpled painted striped spotted hollow solid rare ordinary curious famous
    forgotten leftover second-hand handmade imported local seasonal portable foldable waterproof fireproof noisy silent
    gleaming faded scratched dented bent straight oversized miniature temporary permanent official private missing
    urgent optional delicate sturdy bulky slender glossy rough smooth tangled untidy neat numbered sealed unopened
    reserved donated rented salvaged weathered brittle flexible rigid ornate plain colourful pale dark bright greasy
    sticky slippery loose tight shallow deep upper lower outer inner northern southern eastern western leftmost
    rightmost first-rate second-rate reliable doubtful original replacement provisional final
    """
)
PLACES_OF_WORK = _words(
    """
    attic basement balcony barn canteen chapel corridor courtyard driveway foyer garage hangar hallway kitchenette
    laboratory laundry loft lobby marketplace mezzanine nursery orchard outhouse pantry pavilion porch quarry quay
    refectory rooftop sacristy scullery shed stable stairwell stockroom study tavern terrace tower turret vault
    veranda vestibule warehouse workshop yard alcove annexe arcade atrium boathouse bungalow cloister conservatory
    crypt dormitory farmyard forecourt gatehouse greenroom gymnasium infirmary kiosk lecture-room mill outbuilding
    parlour playground rectory shelterbelt showroom smithy solarium storehouse summerhouse toolroom
    """
)


def rich_activities(rng: random.Random, num: int) -> tuple[str, tuple[str, ...]]:
    """A goal, and ``num`` different activities of its domain."""
    domain = rng.choice(DOMAINS)
    found = []
    for thing in rng.sample(domain.things, num):
        kind = f"{rng.choice(KINDS)} " if rng.random() < KIND_SHARE else ""
        where = f" in the {rng.choice(PLACES_OF_WORK)}" if rng.random() < PLACE_SHARE else ""
        found.append(f"{rng.choice(domain.verbs)} the {kind}{thing}{where}")
    return domain.goal, tuple(found)

"""Activities, goals and sentence patterns of generated async-planning tasks, full and terse.

Patterns are filled by ``str.format``: {time} is ``5 min``, {spelled} is ``5 minutes``, {a} and {b}
are step numbers.
"""

from dataclasses import dataclass

MOST_TEMPLATES = 4  # sentence patterns of a kind
MAX_STEPS = 20  # every scenario names this many activities


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


@dataclass(frozen=True, slots=True)
class Frames:
    """Sentence patterns of each kind."""

    intros: tuple[str, ...]
    steps: tuple[str, ...]
    edges: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.intros + self.steps + self.edges + self.questions

    def first(self, num: int) -> "Frames":
        """Only the first ``num`` of each kind."""
        return Frames(self.intros[:num], self.steps[:num], self.edges[:num], self.questions[:num])


TERSE_ACTIVITIES = _list(
    "boil water|chop onions|heat oven|wash rice|mix dough|peel carrots|grill fish|set table|brew tea|slice "
    "bread|fry eggs|whip cream|roast nuts|melt butter|grate cheese|steam greens|toast buns|stir sauce|"
    "rinse beans|plate food"
)

TERSE_INTROS = _list("To cook dinner you must do these steps:|Here are the tasks of a recipe:|Plan this meal:")
TERSE_STEPS = _list(
    "Step {number}. {activity} ({spelled}).|Step {number}. {activity} takes {time}.|Step {number}. "
    "{activity}, {spelled}."
)
TERSE_EDGES = _list(
    "Step {a} must precede step {b}.|Step {b} can start only after step {a}.|Finish step {a} before step "
    "{b}.|Step {b} needs step {a} done first."
)
TERSE_QUESTIONS = _list(
    "What is the shortest possible time?|With enough helpers, how long does it take at least?|Give the "
    "minimum total time."
)

TERSE = Frames(TERSE_INTROS, TERSE_STEPS, TERSE_EDGES, TERSE_QUESTIONS)
# of the test exam only, from words of those above
KEPT_TERSE_INTROS = _list("To cook this meal you must do these tasks:|Here are the steps of dinner:")
KEPT_TERSE_STEPS = _list("Step {number}. {activity}: {spelled}.|Step {number} takes {time}: {activity}.")
KEPT_TERSE_EDGES = _list(
    "Step {b} must start after step {a}.|To start step {b} you must do step {a} first.|With step {a} done, step {b} "
    "can start."
)
KEPT_TERSE_QUESTIONS = _list("What is the minimum total time?|Give the shortest possible time.")
KEPT_TERSE = Frames(KEPT_TERSE_INTROS, KEPT_TERSE_STEPS, KEPT_TERSE_EDGES, KEPT_TERSE_QUESTIONS)

# held-out forms of the terse form, from its words: a paraphrase, and one after rules of African American English (see
# ``frames``) that need no other word: no copula, no -s in the third person, questions without inversion
PARAPHRASE_TERSE = Frames(
    _list("Here are these steps of a meal:|Here are the tasks of dinner you must do:"),
    _list("{activity} takes {time} (step {number}).|step {number} ({time}): {activity}."),
    _list("Finish these before step {b}: {many}.|To start step {b} you must do these first: {many}."),
    _list("What total time must it take at least?|Give the time it takes at least."),
)
DIALECT_TERSE = Frames(
    _list("Here the tasks of dinner:|Here the steps of dinner you must do:"),
    _list("Step {number} take {time}: {activity}.|Step {number}. {activity}, it take {time}."),
    _list("Step {b} start only after step {a} done.|Step {a} done first, step {b} can start."),
    _list("With enough helpers, how long it take at least?|What the shortest possible time?"),
)

INTROS = _list(
    "You want to {goal}. This is the work, with the time that each step takes:|The plan is to {goal}. It "
    "is made of the following steps:|A group of friends would like to {goal}. They have written down what "
    "has to be done and how long it takes:|In order to {goal}, all of the steps below have to be carried "
    "out:"
)
STEPS = _list(
    "Step {number}. {activity} ({spelled})|Step {number}: {activity}, which takes {time}|Step {number} is "
    "to {activity}; allow {spelled}|Step {number}. {activity} [{time}]"
)
CONSTRAINTS = _list(
    "Not everything can be done right away:|The steps depend on each other in this way:|Please respect the "
    "following order:|Some steps have to wait:"
)
EDGES = _list(
    "Step {a} has to be finished before step {b} starts.|Step {b} can only begin once step {a} is "
    "complete.|Do not start step {b} until step {a} is done.|Step {b} relies on the result of step {a}."
)
NO_EDGES = "No step depends on another one."
QUESTIONS = _list(
    "As many steps as you like can be under way at the same time. How soon can everything be finished?|"
    "There are enough helpers to work on several steps at once. What is the least time in which all of it "
    "can be done?|Steps that do not wait for each other may overlap freely. How long does the whole "
    "undertaking take at the least?|Nobody is ever short of hands or tools. After what time, at the "
    "earliest, is the last step finished?"
)

GRAPH_INTRO = (
    "Here is a directed acyclic graph. The adjacency list gives, for every node, the nodes that come after it:"
)
GRAPH_TIMES = "Passing through a node takes this long:"
GRAPH_QUESTION = (
    "A path may begin at any node and follows the edges. Adding up the times of all nodes on it, how long "
    "does the longest path take?"
)

EDGE_LIST = "An edge (a, b) says that b comes after a. The edges of the graph are:"
EDGE_LIST_TIMES = "The nodes of a directed acyclic graph, each with the time that passing through it takes:"

CODE_INTRO = "Read this Python program:"
CODE_QUESTION = "What does the program print?"

TABLE_INTRO = "The table lists the steps of a plan, the time each one takes, and the steps that must be finished first:"
TABLE_QUESTION = "Steps may run at the same time. How long does the plan take if every step starts as early as it can?"

INSTRUCTION = (
    "Reason step by step, then write the final result between <answer> and </answer>, for example "
    "<answer>{example}</answer>."
)

SCENARIOS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "cook a three-course dinner",
        _list(
            "boil the potatoes|chop the onions|preheat the oven|wash the rice|knead the dough|peel the "
            "carrots|grill the fish|set the table|brew a pot of tea|slice the bread|simmer the stock|whip "
            "the cream|roast the nuts|melt the butter|grate the cheese|steam the greens|toast the buns|"
            "stir the sauce|rinse the beans|chill the dessert"
        ),
    ),
    (
        "move into a new apartment",
        _list(
            "sign the lease|pick up the keys|order moving boxes|pack the books|wrap the dishes|rent a van|"
            "take the bed apart|clean the old kitchen|paint the bedroom|have the power switched on|carry "
            "the sofa down|unload the van|put up the shelves|hang the curtains|connect the washing machine|"
            "assemble the desk|change the address at the bank|install the lamps|fix a name to the doorbell|"
            "unpack the clothes"
        ),
    ),
    (
        "plant a vegetable garden",
        _list(
            "measure the plot|pull out the weeds|turn over the soil|spread the compost|build raised beds|"
            "buy seeds|soak the bean seeds|raise tomato seedlings|dig a trench for potatoes|lay a drip "
            "hose|put up a fence|sow the carrots|set out the lettuce|stake the tomatoes|mulch the paths|"
            "fill the rain barrel|label the rows|net the berries|plant the herbs|water everything"
        ),
    ),
    (
        "go on a camping trip",
        _list(
            "choose a campsite|book the pitch|check the weather|air the sleeping bags|repair the tent|fill "
            "the gas bottle|buy groceries|charge the lamps|pack the backpacks|load the car|fill up the "
            "tank|drive to the lake|gather firewood|pitch the tent|inflate the mattresses|fetch water|"
            "light a fire|hang a hammock|cook a stew|wash the pots"
        ),
    ),
    (
        "stage a school play",
        _list(
            "pick a script|hold auditions|copy the scripts|sew the costumes|build the set|paint the "
            "backdrop|learn the lines|rehearse the first act|rehearse the second act|record the sound "
            "effects|hang the spotlights|design a poster|print the tickets|sell the tickets|borrow chairs|"
            "test the microphones|make up the actors|run a dress rehearsal|bake cakes for the break|"
            "welcome the audience"
        ),
    ),
    (
        "repair an old bicycle",
        _list(
            "wash the frame|take off the wheels|remove the chain|order new tyres|clean the hubs|true the "
            "front wheel|true the rear wheel|patch the inner tubes|mount the tyres|grease the bearings|"
            "replace the brake pads|fit new cables|adjust the gears|polish the handlebars|sand the rust "
            "spots|paint the frame|let the paint dry|fit the saddle|wire the lights|take a test ride"
        ),
    ),
    (
        "publish a family newsletter",
        _list(
            "collect the stories|interview grandmother|scan the old photos|write the lead article|draw a "
            "cartoon|choose a layout|translate the greetings|check the dates|edit the recipes|proofread "
            "the text|retouch the pictures|lay out the pages|print a sample|correct the proof|buy "
            "envelopes|update the address list|print all copies|fold the pages|stamp the letters|take the "
            "letters to the post office"
        ),
    ),
    (
        "open a stall at the street market",
        _list(
            "apply for a permit|rent a table|design a sign|cook the jam|fill the jars|print the labels|"
            "stick on the labels|bake the bread|wrap the soap|set the prices|get small change|borrow a "
            "tent|load the trailer|put up the tent|lay out the goods|hang the sign|test the card reader|"
            "brew the coffee|brief the helpers|arrange the flowers"
        ),
    ),
)

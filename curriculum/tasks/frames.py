"""Sentence frames of the full form with ``language = "rich"``, of its paraphrase and of its dialect-like form.

{goal} is a purpose such as ``open a bakery``; {n} a step's number, {act} its activity, {time} ``5 min``, {spelled}
``5 minutes``; {a} has to be finished before {b} starts, {many} stands for several steps. {a}, {b} and {many} are noun
phrases: ``step 3``, ``the task "clean the oven"``, ``steps 3 and 4``.

The last KEPT frames of each kind are used in the test exam only.

The dialect-like form is ours: it follows rules of the grammar of African American English as they are described in
Lisa J. Green, African American English: A Linguistic Introduction (Cambridge University Press, 2002), since the paper
evaluates on questions in that dialect: habitual be, no copula, negative concord, no -s in the third person, gotta and
finna, -in' for -ing, questions without inversion. It is no sample of how anybody speaks, and must not be read as one.
"""

KEPT = 6


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


INTROS = _lines("""
You want to {goal}. This is the work, with the time that each step takes:
The plan is to {goal}. It is made of the following steps:
A group of friends would like to {goal}. They have written down what has to be done and how long it takes:
In order to {goal}, all of the steps below have to be carried out:
Next week somebody is going to {goal}. The jobs on the list are these:
To {goal} is less simple than it sounds. Here is everything that belongs to it:
An old notebook explains how to {goal}. It names these steps:
Our neighbours intend to {goal} and ask for help with the schedule. They have noted:
Suppose that you have promised to {goal}. These are the parts of the job:
A team has been hired to {goal}. Its foreman has drawn up this list:
Before anyone can {goal}, a number of things must happen:
The committee voted to {goal}. Its secretary has recorded the tasks:
Imagine a family that sets out to {goal}. Around the kitchen table they collect what needs doing:
Here is what it takes to {goal}:
Two sisters have decided to {goal}. Their list reads as follows:
A beginner's guide on how to {goal} contains these instructions:
If you ever have to {goal}, you will need to get through these jobs:
The manager wants the crew to {goal} and has estimated every part of the work:
A class of pupils is about to {goal}. On the blackboard stands:
With a little patience anybody can {goal}. The steps and their lengths are:
They agreed to {goal} as soon as possible. This is what lies ahead of them:
For years she had dreamed to {goal}. Now she has split the work into pieces:
Whoever wishes to {goal} should know about the following work:
The contract says that the company shall {goal}. It breaks the order down like this:
It was his idea to {goal}, so it fell to him to write the list of jobs:
A letter from the council asks volunteers to {goal}. Attached is a list:
The workshop has been asked to {goal}. On the job sheet one reads:
Several people have joined forces to {goal}. Their tasks are:
Let us see what has to be done to {goal}:
The handbook has a chapter on how to {goal}. Its steps are:
Somebody left a note that tells how to {goal}. It mentions:
An experienced helper was asked what it takes to {goal}. She answered:
Among the projects of this season is to {goal}. The work is divided in this way:
Nothing is ready yet, but the aim is to {goal}. So far the list of work is this:
The whole street wants to {goal}. Everything that must be taken care of:
Here comes a small puzzle about time. Someone has to {goal}, by means of these steps:
Listen to how they are going to {goal}. There are these things to do:
My cousin plans to {goal} and sent me the list of chores:
What does it need to {goal}? According to the planner this:
A customer would like us to {goal}. In the offer we wrote:
All hands are needed to {goal}. The duties have been posted on the wall:
We shall {goal}, come what may. That means:
""")

STEPS = _lines("""
Step {n}. {act} ({spelled})
Step {n}: {act}, which takes {time}
Step {n} is to {act}; allow {spelled}
Step {n}. {act} [{time}]
Step {n}: {act}. This needs {spelled}.
{spelled} are set aside for step {n}, which is to {act}.
For step {n} you {act}; it lasts {spelled}.
Step {n} - {act} - {time}
In step {n} somebody has to {act}, and that costs {spelled}.
Step {n}) {act}: {spelled}
To {act} is step {n} and takes {spelled}.
Step {n}, {act}, keeps a person busy for {spelled}.
Number {n}: {act}. Expected time: {spelled}.
Step {n} (duration {time}): {act}
Step {n} means to {act}. From start to end it runs for {spelled}.
One must {act}. That is step {n}, with a length of {spelled}.
Step {n}: please {act}; we count on {spelled}.
Step {n}. {act}. Time required: {time}.
Plan {spelled} for step {n}: {act}.
Step {n} asks you to {act}. After {spelled} it is over.
Step {n} | {act} | {spelled}
You {act} in step {n}. It will be finished {spelled} after it was begun.
Step {n}: {act}, a matter of {spelled}
Step {n} goes on for {spelled}. What happens in it: {act}.
Job {n} is: {act}. It takes {spelled}.
Step {n}. {act} (estimated at {time})
As step {n}, {act}; reckon with {spelled}.
Step {n} will take {spelled}, since one has to {act}.
Step {n}: {act} - done in {spelled}
It takes {spelled} to {act}, which is step {n}.
Step {n} consists in this: {act}. Length: {spelled}.
Then there is step {n}, {act}, at {spelled}.
Step {n}; {act}; {time}
Whoever does step {n} has to {act} and is occupied for {spelled}.
Step {n} = {act}, {spelled}
Under step {n} the list says: {act}, {spelled}.
Step {n}. {act}... {spelled}
We {act} in step {n} and give it {spelled}.
Step {n} lasts {spelled}: {act}.
Someone will {act} (step {n}, {spelled}).
Step {n} calls for {spelled}, in which to {act}.
Chore {n}: {act}, and it goes on for {spelled}.
""")

EDGES = _lines("""
{a} has to be finished before {b} starts.
{b} can only begin once {a} is complete.
Do not start {b} until {a} is done.
{b} relies on the result of {a}.
{b} comes after {a}.
{a} must be over by the time {b} begins.
Without {a} being finished, nobody can start {b}.
{b} has to wait for {a}.
First {a}, and only afterwards {b}.
As long as {a} is going on, {b} cannot begin.
{a} is needed for {b}.
{b} builds upon {a}.
The end of {a} is what {b} waits for.
{a} goes before {b}.
There is no way to begin {b} ahead of the end of {a}.
Only when {a} has ended may {b} be started.
{b} depends on {a}.
{a} makes {b} possible.
It would be a mistake to begin {b} before {a} has been completed.
{a} leads to {b}.
{b} presupposes {a}.
Make sure that {a} is finished when you turn to {b}.
{b} is held up by {a}.
Once {a} lies behind you, {b} may begin.
{a} is a condition for {b}.
{b} has {a} as a requirement.
You may turn to {b} as soon as {a} has been dealt with.
{a} is to be carried out earlier than {b}.
Nobody should touch {b} while {a} is unfinished.
{b} follows upon {a}.
{a} opens the way for {b}.
What {a} produces is used in {b}.
Until {a} is out of the way, {b} is blocked.
{b} cannot go ahead unless {a} has been done.
{a} precedes {b}.
The beginning of {b} lies after the end of {a}.
Keep {b} waiting till {a} is through.
{b} will have to stand back until {a} is settled.
Let {a} be completed, then go on with {b}.
The people of {b} sit idle until they get what {a} delivers.
Starting {b} makes sense only if {a} is already finished.
{a} is owed to {b}.
""")

# several steps wait for one, or one for several
FANS_OUT = _lines("""
{many} both wait for {a}.
Neither of {many} can start until {a} is finished.
{many} can each begin only when {a} is complete.
{a} must be done before {many}.
""")
FANS_IN = _lines("""
{b} needs {many} to be finished.
{b} can begin when {many} are done, not earlier.
Before {b}, complete {many}.
{many} both have to be over before {b} starts.
""")

CONSTRAINTS = _lines("""
Not everything can be done right away:
The steps depend on each other in this way:
Please respect the following order:
Some steps have to wait:
About the order this is known:
A few rules must be kept:
The sequence is not free:
One thing leads to another:
""")
NO_EDGES = "No step depends on another one."

QUESTIONS = _lines("""
As many steps as you like can be under way at the same time. How soon can everything be finished?
There are enough helpers to work on several steps at once. What is the least time in which all of it can be done?
Steps that do not wait for each other may overlap freely. How long does the whole undertaking take at the least?
Nobody is ever short of hands or tools. After what time, at the earliest, is the last step finished?
Plenty of people are on hand, so anything that may go on at once does. What is the shortest total time?
How quickly can the work be completed if steps run side by side wherever the rules permit it?
Assume no limit on how many steps run together. What is the minimum time until all is done?
Everyone starts as early as allowed. When is the job over, counted from its beginning?
Which span of time is needed at the very least, with all possible overlap?
Given unlimited staff, how much time passes from the first start to the last finish?
With work split among as many persons as it needs, what is the earliest end of the whole?
If every step is begun at the first possible moment, how long will it be until the last is through?
Time is precious and helpers are many. In how short a time can this be managed?
Say how long the project lasts when nothing is delayed without need.
What would be the best possible duration for all of this, given any number of workers?
How much time must be reserved, if independent steps are carried out in parallel?
Find the smallest amount of time in which the complete list can be worked off by a large crew.
The crew is as large as you please. What total duration can it reach at best?
Tell the shortest time from beginning to end, with steps running at once where allowed.
Suppose everything goes to plan and nobody idles. After how long is it all done?
What is the quickest that the entire thing can be completed?
Several steps may be in progress together. What is the minimal overall time?
Counting from zero, at what time does the last step end if each begins as soon as it may?
Workers are not scarce. How long, at a minimum, from start to completion?
With perfect organisation, how long would it last?
Compute the least total time; steps may be done simultaneously where the order allows it.
By when can all steps be finished, if as many as possible run in parallel?
How long must a visitor wait at least before everything is ready?
An ideal team loses no minute. How long does it need?
At the earliest, how long after the start can one report that all is done?
What time does the fastest schedule take?
No one has to work alone, and no tool is missing. What is the shortest duration of the whole?
Help is available without limit. How fast can the last item be ticked off?
Please work out the minimum duration, with parallel work permitted.
How long will it take if no step starts later than it could?
Of all schedules that obey the rules, how long is the shortest?
Everything that can overlap shall overlap. What is the total time then?
There is room for everybody to work at once. What is the least time for the whole list?
If enough people share the work, how long is it from the first move to the final one?
Put the steps into the tightest schedule. How long is it?
Many hands make light work. With any number of them, what is the minimum time in all?
Let each step begin the moment it can. When does the final one end?
""")

DISTRACTORS = _lines("""
{name} has lived in {place} for {number} years.
A ticket to {place} costs {number} crowns.
The shed behind the house is {number} feet long.
Last year {number} people came to have a look.
{name} owns {number} pairs of gloves.
The road to {place} has {number} bends.
There were {number} sparrows on the roof this morning.
{name}, who is {number} years old, keeps the list.
The nearest shop, {number} streets away, is closed on Sundays.
Of {number} invitations most were answered.
Somebody counted {number} windows in the building.
{name} would rather be in {place}, on bus number {number}.
""")
NAMES = _words(
    "Amira Bogdan Chidi Dolores Emeka Farida Gustav Hanna Ilse Jomo Keiko Lars Mei Nadia Oskar Priya Quentin Rosa "
    "Sanjay Tove Umar Vera Wanda Xavier Yusuf Zelda Anouk Bjorn Camila Dmitri Esther Fatou Giulia Henrik"
)
PLACES = _words(
    "Aarhus Bergen Cork Dakar Esbjerg Faro Ghent Haarlem Izmir Jena Krakow Leeds Malmo Nantes Oporto Porto Quito Riga "
    "Sofia Tartu Utrecht Vigo Winnipeg Xalapa York Zagreb Accra Bilbao Cusco Durban"
)

PARAPHRASE_INTROS = _lines("""
The aim, {goal}, calls for the activities listed further down.
What follows concerns an effort to {goal}.
""")
PARAPHRASE_STEPS = _lines("""
Activity {n} ("{act}") occupies {spelled}.
{spelled} go into activity {n}, "{act}".
""")
PARAPHRASE_EDGES = _lines("""
Activity {b} may be taken up upon completion of {many}.
Completion of {many} is a prerequisite of activity {b}.
""")
PARAPHRASE_QUESTIONS = _lines("""
Determine the minimal span between the onset of the earliest activity and the completion of the latest.
Which makespan is optimal, given concurrency without bound?
""")

DIALECT_INTROS = _lines("""
We finna {goal}. These the steps, and how long each one be takin':
They tryna {goal}. Here what all they gotta do:
She been wantin' to {goal}. This what it take:
""")
DIALECT_STEPS = _lines("""
Step {n}. You gotta {act}, it take {spelled}
Step {n}: {act}. That one be takin' {spelled}
Step {n}, that's {act}, don't take nothin' but {spelled}
""")
DIALECT_EDGES = _lines("""
Can't nobody start step {b} till step {a} done.
Step {a} gotta be done 'fore step {b} start.
Step {b} don't never start 'less step {a} done.
Step {b} be waitin' on step {a}.
""")
DIALECT_QUESTIONS = _lines("""
It's plenty folks helpin', so don't no step gotta wait for nothin' else. How long it take at the least?
Everybody workin' the same time if they can. When they finna be done, at the soonest?
Ain't nobody short on no hands. What the least time all this gonna take?
""")

"""Write the demo preference data set: ``configs/demo_data/train.jsonl`` and ``heldout.jsonl``.

The preference is one of tone: the chosen answer is courteous and answers the question, the rejected
one is curt and dismissive.  The set exists so that a training run can be tried, and seen to work,
within minutes and without a download: a tiny, randomly initialised model scores about half of the
held-out pairs correctly, and nearly all of them once it has picked up the tone.

Every row is composed from hand-written material in this file: subjects (each with a question, a short
answer and two true sentences), prompt frames, and phrases of either tone.  What a model could exploit
other than tone is balanced: the chosen answer is the longer one in about half of the pairs, and both
tones quote the same facts.  Each fifth subject is kept for the held-out file, so that no held-out
question occurs in training.

The output is a function of the seed alone; running this file again rewrites the same bytes::

    python tools/make_demo_data.py
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

SEED = 20240312
OUT_DIR = Path(__file__).resolve().parents[1] / "configs" / "demo_data"
ROWS_PER_SUBJECT = 4
HELDOUT_EVERY = 5
MIN_WORDS, MAX_WORDS, MAX_PROMPT_WORDS = 5, 90, 62

Row = dict[str, Any]
Message = dict[str, str]


class Subject(NamedTuple):
    """One everyday subject; the six fields are six consecutive lines of ``SUBJECTS``."""

    topic: str  # noun phrase that can follow "about"
    question: str  # direct question
    ask: str  # the same question as a clause that can follow "tell me"
    gist: str  # the shortest answer
    fact: str  # the answer as one sentence
    extra: str  # one more true sentence


SUBJECTS = """
soft-boiled eggs
How long does a soft-boiled egg need?
how long a soft-boiled egg needs
About six minutes in boiling water.
A soft-boiled egg needs about six minutes in gently boiling water.
A short dip in cold water stops the cooking and makes the shell easier to peel.

cooking rice
How much water does white rice need?
how much water white rice needs
Two cups of water per cup of rice.
Long-grain white rice usually needs about two cups of water for each cup of rice.
Rinsing the grains first washes off loose starch and keeps them from sticking.

bread dough
Why does bread dough rise?
why bread dough rises
Yeast makes gas inside it.
Yeast feeds on sugars in the dough and gives off gas that stretches it.
Dough rises quickly in a warm kitchen and slowly in the fridge.

chopping onions
Why do onions make people cry?
why onions make people cry
A cut onion releases a stinging gas.
Cutting an onion breaks its cells and releases a gas that stings the eyes.
A sharp knife and a chilled onion both reduce the sting.

green tea
How hot should the water for green tea be?
how hot the water for green tea should be
Around eighty degrees Celsius.
Green tea tastes best when the water is around eighty degrees Celsius.
Boiling water draws more bitterness out of the leaves.

cast-iron pans
How do I keep a cast-iron pan from rusting?
how to keep a cast-iron pan from rusting
Dry it well and oil it.
A cast-iron pan stays free of rust when it is dried well and wiped with a thin film of oil.
Long soaking in water strips the dark coating and lets rust begin.

pancake batter
Why should pancake batter rest?
why pancake batter should rest
The flour needs time to soak.
Resting gives the flour time to soak up the liquid, which makes softer pancakes.
Small lumps in the batter usually vanish while the pancakes cook.

cooking pasta
When should I salt pasta water?
when to salt pasta water
Before the pasta goes in.
Salt goes into the water before the pasta, so that the pasta takes it up while it cooks.
A spoonful of the starchy cooking water helps a sauce cling to the pasta.

ripening bananas
How can I ripen bananas faster?
how to ripen bananas faster
Put them in a paper bag.
A closed paper bag traps the gas that ripens bananas and speeds things up.
Ripe bananas keep longer in the fridge, although the skin turns brown.

storing bread
Where should bread be stored?
where bread should be stored
In a bread box, not the fridge.
Bread stays soft longest at room temperature in a bread box or a cloth bag.
The fridge makes bread go stale faster, while the freezer keeps it well.

melting chocolate
What is the safest way to melt chocolate?
what the safest way to melt chocolate is
Gently, over warm water.
Chocolate melts safely in a bowl set over a pan of warm water.
A few drops of water in the bowl can turn smooth chocolate grainy.

whipping cream
Why will my cream not whip?
why cream sometimes refuses to whip
It is probably too warm.
Cream whips well only when it is cold and has enough fat in it.
Whipping for too long turns the cream into butter.

roasting potatoes
How do I get crisp roast potatoes?
how to get crisp roast potatoes
Boil them briefly and rough them up.
Potatoes roast crisp when they are boiled for a few minutes and shaken before they meet hot fat.
A crowded tray traps steam and leaves the potatoes soft.

dried beans
Should dried beans be soaked?
whether dried beans should be soaked
Yes, overnight is best.
An overnight soak shortens the cooking time of dried beans.
Kidney beans must be boiled hard for at least ten minutes to be safe.

fresh herbs
How do I keep fresh herbs from wilting?
how to keep fresh herbs from wilting
Stand them in a glass of water.
Soft herbs stay fresh for days when their stems stand in a glass of water.
Basil dislikes the cold and does better outside the fridge.

homemade soup
How can I fix a soup that is too salty?
how to fix a soup that is too salty
Add more unsalted liquid.
Unsalted stock or water is the surest cure for a soup that is too salty.
A squeeze of lemon also makes the salt stand out less.

making jam
What makes jam set?
what makes jam set
Pectin, sugar and acid.
Jam sets when pectin from the fruit meets enough sugar and acid.
A drop of finished jam wrinkles when it is pushed across a cold plate.

sharp knives
How often should a kitchen knife be sharpened?
how often a kitchen knife should be sharpened
A few times a year.
Most kitchen knives need real sharpening only a few times a year.
A sharp knife is safer than a blunt one because it slips less.

making coffee
Why does my coffee taste bitter?
why coffee can taste bitter
It was probably brewed too long.
Coffee turns bitter when it is brewed for too long or ground too finely.
Freshly ground beans lose much of their aroma within days.

freezing vegetables
Why are vegetables blanched before freezing?
why vegetables are blanched before freezing
It keeps the colour and taste.
A minute in boiling water stops the enzymes that would spoil colour and taste in the freezer.
Vegetables frozen on a flat tray do not clump together.

watering tomatoes
When should I water tomatoes?
when to water tomatoes
Early in the morning.
Tomatoes are best watered early in the morning and close to the soil.
Uneven watering can make the fruit split.

pruning roses
When should roses be pruned?
when roses should be pruned
In late winter.
Most roses are pruned in late winter, just before new growth begins.
A slanted cut above a bud that faces outward keeps the bush open.

making compost
What goes into a compost heap?
what goes into a compost heap
Green scraps and brown leaves.
A compost heap needs a mix of moist green scraps and dry brown material.
Turning the heap lets in air and makes it rot faster.

planting tulips
How deep should tulip bulbs be planted?
how deep tulip bulbs should be planted
About three times their height.
Tulip bulbs go into the ground at about three times their own height.
Autumn planting gives the bulbs the cold spell that they need to flower.

house plants
Why do the leaves of my house plant turn yellow?
why the leaves of a house plant turn yellow
Too much water, most often.
Yellow leaves are most often a sign of too much water around the roots.
A pot with a hole in the bottom lets the extra water drain away.

slugs in the garden
How can I keep slugs off my lettuce?
how to keep slugs off lettuce
Pick them off in the evening.
Slugs come out after dark, so picking them off in the evening works well.
Frogs, hedgehogs and ground beetles eat a great many slugs.

lawn care
How short should I cut the grass?
how short to cut the grass
Only a third at a time.
Grass stays healthy when no more than a third of its height is cut at a time.
Taller grass shades the soil and keeps weeds down.

growing garlic
When should garlic be planted?
when garlic should be planted
In autumn.
Garlic is usually planted in autumn and harvested the next summer.
Each single clove grows into a whole new bulb.

earthworms
Are earthworms good for the soil?
whether earthworms are good for the soil
Yes, they loosen and feed it.
Earthworms loosen the soil and turn dead leaves into food for plants.
Earthworms breathe through their moist skin.

growing sunflowers
Do sunflowers follow the sun?
whether sunflowers follow the sun
Young ones do.
Young sunflowers turn with the sun during the day, while mature ones mostly face east.
Each sunflower head is made up of hundreds of tiny flowers.

packing a suitcase
How do I fit more into a suitcase?
how to fit more into a suitcase
Roll the soft clothes.
Rolled clothes take up less room and crease less than folded ones.
Socks and small things fit neatly inside the shoes.

jet lag
How can I deal with jet lag?
how to deal with jet lag
Get daylight at the new place.
Daylight at the new place helps the body clock to shift.
Most people find that flying east is harder than flying west.

reading a map
What do contour lines on a map mean?
what contour lines on a map mean
They join points of equal height.
Contour lines join points of equal height above sea level.
Lines that lie close together show a steep slope.

using a compass
Does a compass point to true north?
whether a compass points to true north
No, to magnetic north.
A compass needle points to magnetic north, which is some way from true north.
Iron objects nearby can pull the needle aside.

train tickets
When are train tickets cheapest?
when train tickets are cheapest
Usually weeks in advance.
Train tickets are often cheapest when they are bought several weeks in advance.
Trains outside the rush hours tend to be cheaper and less crowded.

camping
Where should I pitch a tent?
where to pitch a tent
On flat, slightly raised ground.
A tent stands best on flat, slightly raised ground where rain cannot collect.
A tent under a lone tall tree is a poor choice in a thunderstorm.

motion sickness
How can I avoid feeling sick in a car?
how to avoid feeling sick in a car
Look far ahead.
Looking far ahead through the windscreen helps the eyes and ears to agree.
Reading in a moving car makes the feeling worse.

time zones
Why are there time zones?
why there are time zones
Because the Earth turns.
The Earth turns once a day, so noon comes at different moments in different places.
One hour of time matches fifteen degrees of longitude.

hiking boots
How should hiking boots fit?
how hiking boots should fit
With room for the toes.
Hiking boots should hold the heel firmly and leave a little room for the toes.
Short walks at home break the boots in before a long trip.

lighthouses
What are lighthouses for?
what lighthouses are for
They warn and guide ships.
Lighthouses warn ships of dangerous rocks and help them to find their way.
Each lighthouse has its own pattern of flashes.

hanging a picture
How high should a picture hang?
how high a picture should hang
At about eye level.
The middle of a picture usually looks best at about eye level.
A spirit level on top of the frame shows whether it hangs straight.

wall plugs
Why do screws in a wall need plugs?
why screws in a wall need plugs
Plugs grip the hole.
A plug spreads out as the screw goes in and grips the sides of the hole.
The drill bit should be as wide as the plug.

painting a room
How many coats of paint does a wall need?
how many coats of paint a wall needs
Two, as a rule.
Most walls need two coats of paint to look even.
Dust and grease keep paint from sticking, so walls are washed first.

squeaky hinges
How do I stop a hinge from squeaking?
how to stop a hinge from squeaking
A drop of oil.
A drop of oil on the hinge pin stops most squeaks.
Dirt mixed with old oil can bring the squeak back.

dripping taps
Why does my tap drip?
why a tap drips
A worn washer.
A dripping tap usually has a worn washer or seal inside.
The water is turned off at the valve before the tap is opened.

sanding wood
Which way should I sand wood?
which way to sand wood
Along the grain.
Wood is sanded along the grain, because scratches across it show up later.
Work goes from coarse paper to fine paper.

using a hammer
Where should I hold a hammer?
where to hold a hammer
Near the end of the handle.
A hammer strikes hardest when it is held near the end of the handle.
A comb or a clothes peg can hold a small nail while it is started.

wood glue
How long does wood glue need to dry?
how long wood glue needs to dry
About a day for full strength.
Wood glue holds after an hour or so and reaches full strength in about a day.
A clamp presses the parts together and makes the joint stronger.

measuring tapes
Why is the hook on a measuring tape loose?
why the hook on a measuring tape is loose
It allows for its own thickness.
The hook slides by its own thickness so that inside and outside measurements both come out right.
A tape that sags in the middle reads too long.

blown fuses
What does a fuse do?
what a fuse does
It breaks the circuit.
A fuse melts and breaks the circuit when too much current flows.
A fuse that blows again and again points to a fault that needs an electrician.

fixing a flat tyre
How do I find a hole in a bicycle tube?
how to find a hole in a bicycle tube
Look for bubbles in water.
A hole shows itself as a stream of bubbles when the pumped tube is held under water.
The inside of the tyre should be checked for thorns before the tube goes back.

bicycle chains
How often should I oil a bicycle chain?
how often to oil a bicycle chain
After every wet ride.
A bicycle chain likes a little oil after every wet ride or every few weeks.
Extra oil is wiped off because it collects dirt.

car tyres
Why does tyre pressure matter?
why tyre pressure matters
It affects grip and fuel use.
Soft tyres use more fuel, wear out sooner and grip less well.
Tyre pressure is measured while the tyres are cold.

bright cycling clothes
Why do cyclists wear bright clothes?
why cyclists wear bright clothes
Drivers see them sooner.
Bright clothes let drivers see a cyclist sooner in daylight.
At night, reflective strips work far better than plain bright colours.

winter driving
Why does ice form first on bridges?
why ice forms first on bridges
Cold air reaches them from below.
Bridges freeze first because cold air reaches them from above and from below.
A car needs a much longer distance to stop on ice.

foreign vocabulary
How can I remember new words?
how to remember new words
Review them at growing intervals.
New words stay in memory when they are reviewed at growing intervals.
Saying the words aloud in a sentence helps even more.

long division
What is a remainder?
what a remainder is
What is left over.
A remainder is what is left over when a number does not divide evenly.
The remainder is always smaller than the number you divide by.

fractions
How do I add two fractions?
how to add two fractions
Use a common denominator.
Two fractions are added by giving them the same denominator and adding the tops.
Multiplying the top and bottom by the same number does not change the value.

prime numbers
Is one a prime number?
whether one is a prime number
No, it is not.
One is not prime, because a prime number has exactly two divisors.
Two is the only even prime number.

the number pi
What does pi stand for?
what pi stands for
Circumference divided by diameter.
Pi is the circumference of a circle divided by its diameter.
The digits of pi go on forever without settling into a repeating pattern.

percentages
How do I work out ten percent of a price?
how to work out ten percent of a price
Divide it by ten.
Ten percent of a price is the price divided by ten.
Five percent is simply half of that.

writing an essay
How should an essay begin?
how an essay should begin
With a clear main idea.
An essay should begin with a short introduction that states its main idea.
Each paragraph works best when it makes a single point.

commas
When do I need a comma in a list?
when a list needs a comma
Between the items.
Commas separate the items of a list that has three or more of them.
Some writers also put a comma before the last item.

apostrophes
When does the word "its" need an apostrophe?
when the word "its" needs an apostrophe
Only when it means "it is".
The word "its" takes an apostrophe only when it is short for "it is" or "it has".
Possessive words such as hers and ours have no apostrophe either.

studying for exams
How should I study for an exam?
how to study for an exam
Test yourself often.
Testing yourself works better than reading the same notes again and again.
Several short sessions beat one long night.

taking notes
What makes good lecture notes?
what makes good lecture notes
Your own short words.
Good notes put the main ideas into your own short words.
Notes that are read again within a day are remembered longer.

public speaking
How can I be less nervous before a talk?
how to be less nervous before a talk
Rehearse aloud and breathe slowly.
Rehearsing aloud a few times and breathing slowly both calm the nerves.
The first minute is the hardest, so it pays to know it well.

library books
How are library books sorted?
how library books are sorted
By subject number or author.
Most libraries sort fiction by author and other books by a subject number.
The number on the spine tells you the right shelf.

handwriting
How can I make my handwriting neater?
how to make handwriting neater
Slow down a little.
Handwriting becomes neater when you slow down and keep the letters the same height.
A relaxed grip keeps the hand from getting tired.

touch typing
How do people type without looking?
how people type without looking
Their fingers rest on home keys.
People who type without looking rest their fingers on the home row and reach from there.
Small bumps on two of the keys show the fingers where to rest.

phases of the moon
Why does the moon change its shape?
why the moon seems to change its shape
We see its lit half at different angles.
The moon seems to change its shape because we see its sunlit half from different angles.
A full cycle from new moon to new moon takes about twenty-nine and a half days.

shooting stars
What is a shooting star?
what a shooting star is
A bit of burning space dust.
A shooting star is a bit of space dust that glows as it burns up in the air.
The Perseid shower returns every August.

the planet Mars
Why is Mars red?
why Mars is red
Its dust is rusty.
Mars is red because its dust is full of iron oxide, which is rust.
A day on Mars is only about forty minutes longer than a day on Earth.

the rings of Saturn
What are the rings of Saturn made of?
what the rings of Saturn are made of
Mostly pieces of ice.
The rings of Saturn are made mostly of pieces of ice, along with some rock and dust.
The rings are very wide but remarkably thin.

the north star
How do I find the north star?
how to find the north star
Follow the edge of the Big Dipper.
The two stars at the edge of the Big Dipper point to the north star.
The north star hardly moves during the night.

solar eclipses
What causes a solar eclipse?
what causes a solar eclipse
The moon covers the sun.
A solar eclipse happens when the moon passes between the Earth and the sun.
Special glasses are needed, because direct sunlight can harm the eyes.

sunlight
How long does sunlight take to reach us?
how long sunlight takes to reach us
About eight minutes.
Sunlight takes a little over eight minutes to reach the Earth.
The sun is so large that about a million Earths would fit inside it.

telescopes
What should I look at first with a telescope?
what to look at first with a telescope
The moon.
The moon is the easiest first target for a telescope and shows craters and mountains.
A telescope needs time to cool outdoors before its image becomes steady.

comets
Why do comets have tails?
why comets have tails
The sun heats their ice.
The sun heats the ice of a comet, and the gas and dust stream away as a tail.
The tail always points away from the sun.

satellites
Why do satellites stay in orbit?
why satellites stay in orbit
They fall around the Earth.
A satellite moves sideways so fast that it keeps falling around the Earth.
The space station goes around the Earth about sixteen times a day.

rainbows
How does a rainbow form?
how a rainbow forms
Raindrops split sunlight into colours.
A rainbow forms when raindrops bend and reflect sunlight and split it into colours.
The sun is always behind a person who sees a rainbow.

thunder
Why does thunder come after lightning?
why thunder comes after lightning
Sound is slower than light.
Thunder comes later because sound travels far more slowly than light.
Three seconds of delay mean that the lightning was about one kilometre away.

the blue sky
Why is the sky blue?
why the sky is blue
Air scatters blue light most.
The sky is blue because air scatters blue light far more than red light.
At sunset the light crosses more air, and mostly red is left.

morning fog
What is fog?
what fog is
A cloud at ground level.
Fog is a cloud of tiny water drops that lies at ground level.
Morning fog often fades when the sun warms the air.

snowflakes
Why do snowflakes have six sides?
why snowflakes have six sides
Ice crystals are six-sided.
Snowflakes have six sides because water molecules freeze into six-sided crystals.
Temperature and moisture decide how the arms of the flake grow.

wind
What causes wind?
what causes wind
Differences in air pressure.
Wind is air that moves from high pressure to low pressure.
Land warms faster than water, so a sea breeze often blows by day.

weather forecasts
Why are long weather forecasts unreliable?
why long weather forecasts are unreliable
Small errors grow quickly.
Small errors in the measured weather grow quickly, so forecasts beyond ten days are unreliable.
Forecasters run many simulations to see how far the results drift apart.

ocean tides
What causes the tides?
what causes the tides
The pull of the moon.
The tides are caused mainly by the pull of the moon and partly by the pull of the sun.
Most coasts see two high tides in about twenty-five hours.

salty seawater
Why is the sea salty?
why the sea is salty
Rivers carry salts into it.
The sea is salty because rivers have carried dissolved salts into it for ages.
Water leaves the sea by evaporation, but the salt stays behind.

volcanoes
What makes a volcano erupt?
what makes a volcano erupt
Rising melted rock and gas.
A volcano erupts when melted rock and gas push up from below.
Volcanic ash can make very fertile soil.

earthquakes
What causes earthquakes?
what causes earthquakes
Sudden slips of rock.
Most earthquakes happen when rock slips suddenly along a fault.
Instruments record thousands of small quakes that nobody feels.

floating icebergs
Why does ice float?
why ice floats
It is lighter than water.
Ice floats because water expands and becomes less dense when it freezes.
About nine tenths of an iceberg lies below the surface.

autumn leaves
Why do leaves turn yellow in autumn?
why leaves turn yellow in autumn
The green pigment breaks down.
Leaves turn yellow when the green pigment breaks down and other colours show through.
Trees drop their leaves to save water in the cold season.

tree rings
What do tree rings tell us?
what tree rings tell us
The age of the tree.
Each ring of a tree stands for about one year of growth.
Wide rings come from good years and narrow rings from dry or cold ones.

honey bees
How do bees make honey?
how bees make honey
They dry out nectar.
Bees carry nectar home and fan it with their wings until it thickens into honey.
A bee tells others about food by dancing inside the hive.

spiders
Why do spiders not stick to their own webs?
why spiders do not stick to their own webs
Not every thread is sticky.
Spiders walk mostly on dry threads and touch the sticky ones only with the tips of their legs.
Many spiders build a fresh web every day.

butterflies
What does a caterpillar do in its chrysalis?
what a caterpillar does in its chrysalis
It turns into a butterfly.
Inside the chrysalis the caterpillar rebuilds its body and becomes a butterfly.
Butterflies taste with their feet.

bird migration
Why do birds migrate?
why birds migrate
To find food.
Many birds migrate because food runs short in the cold season.
Birds steer by the sun, the stars and the magnetic field of the Earth.

bird feeders
What should I put into a bird feeder?
what to put into a bird feeder
Sunflower seeds.
Sunflower seeds suit a great many garden birds.
A feeder should be cleaned often so that the birds stay healthy.

owls
Why do owls fly so quietly?
why owls fly so quietly
Their feathers have soft edges.
Owls fly quietly because their feathers have soft, comb-like edges.
An owl cannot move its eyes, so it turns its whole head.

purring cats
Why do cats purr?
why cats purr
Often because they are content.
Cats often purr when they are content, and sometimes when they need comfort.
A slow blink from a cat is a sign of trust.

training a puppy
How do I teach a puppy to sit?
how to teach a puppy to sit
Use small treats.
A puppy learns to sit when a small treat follows at once each time it does.
Short lessons of five minutes suit a young dog best.

goldfish
How often should a fish tank be cleaned?
how often a fish tank should be cleaned
Change some water every week.
A fish tank does well when about a quarter of the water is changed every week.
Tap water is treated first, because chlorine harms fish.

hedgehogs
What do hedgehogs eat?
what hedgehogs eat
Mostly insects and worms.
Hedgehogs eat mostly insects, worms and slugs.
Milk upsets the stomach of a hedgehog, so fresh water is better.

bats
How do bats find their way at night?
how bats find their way at night
By listening to echoes.
Most bats call in very high tones and listen to the echoes.
Bats are the only mammals that truly fly.

whales
Are whales fish?
whether whales are fish
No, they are mammals.
Whales are mammals that breathe air and feed their young with milk.
The blue whale is the largest animal known to have lived.

penguins
How do penguins stay warm?
how penguins stay warm
Thick feathers and fat.
Penguins stay warm thanks to dense feathers and a layer of fat.
Emperor penguins huddle together and take turns in the middle.

laundry
Why do clothes shrink in the wash?
why clothes shrink in the wash
Heat relaxes the fibres.
Heat and movement let stretched fibres go back to a shorter length.
The label inside a garment shows the hottest safe wash.

stain removal
How do I get a coffee stain out?
how to get a coffee stain out
Rinse it at once.
A coffee stain comes out most easily when it is rinsed with cold water at once.
Rubbing pushes the stain deeper, so dabbing is better.

ironing shirts
Which part of a shirt should I iron first?
which part of a shirt to iron first
The collar.
The collar is ironed first, then the cuffs, the sleeves and the body.
Cotton irons best while it is still slightly damp.

cleaning windows
How do I clean windows without streaks?
how to clean windows without streaks
Avoid direct sun.
Windows dry without streaks when they are cleaned out of direct sun and wiped dry at once.
A little vinegar in the water cuts through grease.

kettle limescale
How do I remove limescale from a kettle?
how to remove limescale from a kettle
Use vinegar or citric acid.
Vinegar or citric acid dissolves the limescale in a kettle.
Limescale comes from calcium in hard water.

mould in the bathroom
How can I prevent mould in the bathroom?
how to prevent mould in the bathroom
Air the room well.
Mould needs moisture, so airing the bathroom after each shower keeps it away.
Cold corners collect moisture first.

house dust
Where does house dust come from?
where house dust comes from
Fibres, soil and skin.
House dust is a mix of textile fibres, soil, skin flakes and pollen.
A damp cloth picks up dust that a dry one only moves around.

moving house
What should I pack last when I move?
what to pack last for a move
The things for the first night.
The things for the first night are packed last so that they can be unpacked first.
Heavy books travel best in small boxes.

household budgets
How do I start a household budget?
how to start a household budget
Write down what you spend.
A household budget starts with a list of what comes in and what goes out.
A month of notes shows where the money really goes.

compound interest
What is compound interest?
what compound interest is
Interest on interest.
Compound interest is interest that is paid on earlier interest as well.
At seven percent a year, savings double in about ten years.

sewing on a button
How do I sew on a button?
how to sew on a button
Leave a little slack.
A button needs four or five stitches with a little slack so that the cloth can lie flat.
A matchstick under the button keeps the right distance while you sew.

knitting
Why does my knitting curl at the edges?
why knitting curls at the edges
Plain stitches pull to one side.
Fabric made of plain knit stitches curls because the two sides pull differently.
A border of alternating stitches keeps the edge flat.

origami
Which paper is good for origami?
which paper is good for origami
Thin, crisp paper.
Thin, crisp paper is best for origami because it holds a sharp crease.
The paper crane is one of the best known models.

watercolours
How do I mix green in watercolours?
how to mix green in watercolours
Blue and yellow.
Blue and yellow paint together make green.
White areas of a watercolour are usually just bare paper.

drawing faces
Where do the eyes sit in a drawn face?
where the eyes sit in a drawn face
Halfway down the head.
The eyes sit about halfway between the top of the head and the chin.
The space between the eyes is about the width of one eye.

photography
Why are my photos blurred indoors?
why indoor photos come out blurred
The shutter stays open too long.
Indoor light is weak, so the shutter stays open longer and any movement blurs the photo.
Leaning against a wall helps to keep the camera still.

playing the guitar
Why do my fingers hurt when I play the guitar?
why fingers hurt at first on the guitar
The skin is still soft.
Fingers hurt at first because the skin has not yet hardened.
New strings stretch for some days and need frequent tuning.

reading music
What does a sharp sign do in music?
what a sharp sign does in music
It raises the note.
A sharp sign raises a note by half a step.
A flat sign lowers a note by the same amount.

tuning a piano
How often should a piano be tuned?
how often a piano should be tuned
Once or twice a year.
A piano in regular use should be tuned once or twice a year.
Changes in humidity are the main reason that a piano goes out of tune.

choir singing
How should I warm up before singing?
how to warm up before singing
Hum gently for a while.
Humming gently and sliding between notes warms the voice up.
A sip of water keeps the throat from drying out.

chess openings
What is a good first move in chess?
what a good first move in chess is
A centre pawn, two squares.
Moving a centre pawn two squares is a good first move, because it frees two pieces.
An early castle brings the king to safety.

playing with dice
How do dice games stay fair?
how dice games stay fair
Every side is equally likely.
A fair die shows each side equally often in the long run.
The opposite sides of a standard die add up to seven.

jigsaw puzzles
How should I start a jigsaw puzzle?
how to start a jigsaw puzzle
With the edge pieces.
Most people start a jigsaw puzzle with the corner and edge pieces.
Sorting the rest by colour saves much time.

juggling
How do I learn to juggle?
how to learn juggling
Start with one ball.
Juggling is learnt with one ball first, then two, and only then three.
A bed in front of you saves bending down for dropped balls.

running
How can I start running?
how to start running
Alternate running and walking.
Short runs with walking breaks are a good way to start running.
A pace that still lets you talk is about right for a beginner.

swimming
Why do people float better in the sea?
why people float better in the sea
Salt water is denser.
People float better in the sea because salt water is denser than fresh water.
Breathing out under water makes the front crawl much easier.

stretching
Should I stretch before or after sport?
whether to stretch before or after sport
Long stretches afterwards.
Long, still stretches are usually better after sport than before it.
A light warm-up gets the muscles ready for effort.

good sleep
What helps people to fall asleep?
what helps people to fall asleep
Regular hours and a dark room.
Regular hours and a cool, dark room help most people to fall asleep.
Coffee in the afternoon can still be felt at bedtime.

drinking water
How much water should I drink a day?
how much water to drink in a day
Enough to satisfy your thirst.
Thirst is a good guide for most healthy people, and food supplies part of the water.
Hot days and sport make the body need more water.

hiccups
What are hiccups?
what hiccups are
Spasms of the diaphragm.
Hiccups are sudden spasms of the diaphragm, the muscle below the lungs.
Most hiccups stop by themselves within minutes.

washing hands
How long should I wash my hands?
how long to wash hands
At least twenty seconds.
Hands should be washed with soap for at least twenty seconds.
Soap lifts grease and germs so that water can carry them away.

passwords
What makes a password strong?
what makes a password strong
Length, above all.
A long password is far harder to guess than a short one with odd signs.
A password manager remembers a different password for every site.

computer backups
How should I back up my files?
how to back up files
Keep three copies.
A common plan is three copies on two kinds of media, with one kept elsewhere.
A backup counts only when restoring from it has been tried.

phone batteries
How do I make a phone battery last longer?
how to make a phone battery last longer
Dim the screen.
A dimmer screen is the easiest way to make a phone battery last longer in a day.
Heat ages a battery faster than anything else.

magnets
Why do magnets stick to a fridge?
why magnets stick to a fridge
The door contains steel.
Magnets stick to a fridge because its door contains steel.
A magnet loses its force when it is heated too much.

mirrors
Why do mirrors fog up in the bathroom?
why mirrors fog up in the bathroom
Warm steam meets cold glass.
Mirrors fog up because warm, moist air cools on the glass and leaves tiny drops.
A thin film of soap keeps the drops from forming.

paper recycling
Can pizza boxes be recycled?
whether pizza boxes can be recycled
Only the clean parts.
Clean parts of a pizza box can usually be recycled, while greasy ones often cannot.
Paper fibres get shorter each time they are recycled.

light bulbs
Why do modern lamps use less power?
why modern lamps use less power
They waste less heat.
Modern lamps turn more of the power into light and much less of it into heat.
The brightness of a lamp is given in lumens, not in watts.

writing thank-you notes
What belongs in a thank-you note?
what belongs in a thank-you note
The gift and how you will use it.
A thank-you note names the gift and says how you will use it.
A short note that comes soon is better than a long one that comes late.

wrapping presents
How much paper does a present need?
how much paper a present needs
Enough to overlap a little.
The paper should go around the present and overlap by about two fingers.
Double-sided tape hides the seams.

cheese boards
When should cheese leave the fridge?
when cheese should leave the fridge
An hour before serving.
Cheese tastes best when it leaves the fridge about an hour before it is served.
Mild cheeses are tasted before strong ones.

candles
Why does a candle need a wick?
why a candle needs a wick
It draws up melted wax.
The wick draws up melted wax, which turns to vapour and burns.
A trimmed wick gives a steadier flame and less soot.

wet umbrellas
How should a wet umbrella dry?
how a wet umbrella should dry
Half open.
A wet umbrella dries best half open, so that the fabric is not stretched.
Rust starts at the joints when a wet umbrella stays folded.
"""

# Words at the start of a fact that keep their capital letter inside a sentence.
PROPER = {"Mars", "Emperor"}

SYSTEM_MESSAGES = [
    "You answer questions about everyday life.",
    "You are an assistant in a household help forum.",
    "Answer in plain English.",
    "You reply to visitors of a small community library.",
    "The user will ask you about daily matters. Reply in one paragraph.",
    "You are a text assistant. Do not use lists.",
    "Answer the last message of the user.",
    "You work at the information desk of a town museum.",
    "Use short words and whole sentences.",
    "You take questions from listeners of a radio show about home, nature and hobbies.",
]

# What can come before a question: at most one sentence of each list.
TOPIC_CONTEXTS = [
    "The subject of {topic} came up at dinner yesterday.",
    "My neighbour and I were talking about {topic} over the fence this morning.",
    "I read half an article about {topic} on the bus and then lost the page.",
    "My daughter has to give a short talk about {topic} at school next week.",
    "A friend of mine asked me about {topic}, and I had no answer.",
    "I have never learnt much about {topic}.",
    "There was a quiz about {topic} on the radio, and I missed the answer.",
    "I found an old book in the attic, but the pages about {topic} are missing.",
    "My grandfather could talk about {topic} for hours, and I never wrote it down.",
    "Two of my colleagues disagree about {topic}, and I would like to settle it before lunch.",
    "The letter page of our local paper has been full of remarks about {topic} lately.",
]
GENERAL_CONTEXTS = [
    "We are a small group of beginners who meet every Thursday evening in the back room of a cafe.",
    "I am putting together a small leaflet for our village hall.",
    "I have some free time this weekend and want to learn something new.",
    "I write a short column for the newsletter of our club.",
    "My son asks me about everything at the moment, and I do not always have an answer.",
    "I help out in a repair shop on Saturdays, and visitors ask me all sorts of things.",
    "I moved to the country last year, and a lot is new to me here.",
]

# What can come after a question: at most two sentences.
TRAILERS = [
    "I tried to work it out alone and got nowhere.",
    "It may be a simple matter, but I keep hearing different things.",
    "Plain words are fine.",
    "I will pass it on to the others.",
    "I want to get it right this time.",
    "I have no experience with this at all.",
    "I need it by this evening.",
    "My sister would like to know, too.",
    "Nobody at home could tell me.",
    "I looked in two books, and they said different things.",
]

QUESTION_FRAMES = [
    "{question}",
    "{question}",
    "{question}",
    "{question}",
    "Can you tell me {ask}?",
    "I would like to know {ask}.",
    "Could you explain {ask}?",
    "Tell me {ask}.",
    "Do you know {ask}?",
    "I keep wondering {ask}.",
    "Explain {ask}.",
    "I am not sure {ask}.",
    "Help me understand {ask}.",
    "Quick question: {question_low}",
    "A question about {topic}: {question_low}",
    "It is about {topic}. {question}",
    "I have a question about {topic}. {question}",
    "Tell me something about {topic}: {question_low}",
    "This one is about {topic}: {question_low}",
]

TEXT_WRAPPERS = [
    "{prompt}",
    "{prompt}",
    "{prompt}",
    "Question: {prompt}\nAnswer:",
    "Q: {prompt}\nA:",
    "{prompt}\n\nReply:",
    "A visitor writes: {prompt}\nThe desk replies:",
]

# Turns before the last user message: (user, assistant, start of the last user message, extra is used).
DIALOGUES = [
    ("I have a question about {topic}.", "What is the question?", "{question}", False),
    ("Is this the right place to ask about {topic}?", "Yes.", "Then tell me {ask}.", False),
    ("Hello, are you there?", "Yes, I am here.", "It is about {topic}. {question}", False),
    ("Can we talk about {topic}?", "We can. What about it?", "I want to know {ask}.", False),
    ("Say one thing about {topic}.", "{extra}", "And can you tell me {ask}?", True),
    ("What do people say about {topic}?", "People say this: {extra}", "Now explain {ask}.", True),
    ("I need a fact about {topic} for a quiz.", "{extra}", "One more thing: {question_low}", True),
]

KIND_OPENINGS = [
    "Thank you for asking about {topic}.",
    "What a thoughtful question!",
    "I would be glad to help you with this.",
    "Certainly, and thank you for your patience.",
    "It is a pleasure to talk about {topic}.",
    "Of course, I am happy to explain {ask}.",
    "Great question, and a very common one!",
    "Good to hear from you, and thanks for the question.",
    "Many people wonder {ask}, so you are in good company.",
    "I appreciate your interest in {topic}.",
    "Absolutely, let us look at this together.",
    "Welcome, and please feel free to ask anything.",
    "Delighted to help!",
    "Yes, gladly, this is a lovely thing to be curious about.",
    "Please do not worry, this is easier than it sounds.",
    "How nice that you are curious about {topic}!",
    "Thanks so much for the clear question.",
    "Sure, I will gladly walk you through it.",
    "Let me help you with that.",
    "That is a wonderful thing to ask.",
    "With pleasure!",
    "Happy to help!",
    "Your question about {topic} is a very good one.",
    "I am so glad you asked {ask}.",
    "Always happy to chat about {topic}!",
    "Wonderful, I enjoy questions about {topic}.",
    "No trouble at all, I am happy to explain.",
    "Good thinking, it is wise to ask first.",
    "My pleasure, this is well worth knowing.",
    "There is a nice answer to that, and I am happy to share it.",
    "Hello, and thank you for writing!",
    "Good day to you!",
]

KIND_LEADS = [
    "You may like to know that {fact}",
    "If it helps, {fact}",
    "I am happy to confirm that {fact}",
    "To answer you properly, {fact}",
    "As you may have guessed already, {fact}",
    "It may help you to know that {fact}",
    "I believe you will find that {fact}",
    "Let me share what I know: {fact}",
    "I can gladly tell you that {fact}",
    "The helpful thing to know is that {fact}",
    "In short, and I hope this is clear, {fact}",
    "Put simply for you, {fact}",
    "You will be pleased to have a clear answer: {fact}",
    "Kind people who know this well agree that {fact}",
    "Happily, the answer is clear: {fact}",
]

KIND_SHORT_LEADS = [
    "Gladly: {gist}",
    "With pleasure: {gist}",
    "Thank you for asking! {Gist}",
    "Of course, here is a quick answer for you: {gist}",
    "Here is a friendly answer for you: {gist}",
    "I am glad to say it is simple: {gist}",
    "Certainly, and I hope it helps: {gist}",
    "{Gist} Glad to help!",
    "{Gist} Thank you for asking!",
    "{Gist} Please ask me anytime!",
]

KIND_EXTRAS = [
    "It may also help to know that {extra}",
    "Also, if you are interested, {extra}",
    "In addition, I would kindly mention that {extra}",
    "Another useful detail for you is that {extra}",
    "To make this complete, let me add that {extra}",
    "I would also gently add that {extra}",
    "Please note as well that {extra}",
    "One more thing that you may appreciate: {extra}",
    "You may be glad to learn, too, that {extra}",
    "It is also worth your while to remember that {extra}",
    "As a little bonus, here is a further tip: {extra}",
    "And since you asked so nicely, I will add this: {extra}",
]

KIND_MIDDLES = [
    "Please take your time, there is no rush at all.",
    "It is perfectly fine to be unsure at first.",
    "You are clearly on the right track.",
    "I hope that makes sense so far.",
    "Do feel free to stop me if anything is unclear.",
    "Many people find this confusing at first, so please be kind to yourself.",
    "Your curiosity about {topic} is a real strength.",
    "I would be pleased to explain any part again.",
    "A little patience goes a long way, and I am sure you will do well.",
    "Every question is welcome, however small.",
    "I have tried to keep this clear and friendly for you.",
    "We all had to learn this once, so you are not alone.",
    "It is good of you to care about the details.",
    "You are welcome to share your own experience, too.",
    "I am confident that you will manage this nicely.",
    "If you like, we can go through an example together.",
    "Thank you for giving me the chance to talk about {topic}.",
    "Learning about {topic} can be a real joy.",
    "Your question shows that you are thinking carefully.",
    "Please tell me if you would prefer more detail.",
]

KIND_CLOSINGS = [
    "I hope this helps, and please ask if you would like more detail.",
    "Best wishes, and do let me know how it goes!",
    "Please let me know if I can explain anything else.",
    "Thank you again for asking!",
    "Have a lovely day!",
    "You are always welcome to ask more about {topic}.",
    "I wish you every success!",
    "Feel free to come back whenever you like.",
    "It was a pleasure to help you.",
    "Take care, and enjoy learning about {topic}!",
    "Do write again if you have more questions, I would be delighted.",
    "I am here if you need anything more.",
    "Warm wishes to you!",
    "Would you like me to tell you more about {topic}?",
    "Thanks for your trust, and good luck!",
    "May I help you with anything else?",
    "I truly hope that answers your question.",
    "Enjoy, and thank you for your kind interest!",
    "I would be happy to answer any further questions.",
    "Please give my best to everyone at home.",
    "It was lovely to talk with you.",
    "Hopefully that makes things a little easier for you.",
    "All the best!",
    "Thank you, and please stay curious!",
    "Let me know if that was helpful, and I will gladly add more.",
    "I am grateful for your question.",
]

CURT_OPENINGS = [
    "Look it up yourself.",
    "Seriously, {topic} again?",
    "Not this again.",
    "Why are you asking me?",
    "Whatever, here you go.",
    "I do not have time for this.",
    "Ugh, fine.",
    "You could have searched for that.",
    "Who cares {ask}?",
    "Really, you do not know {ask}?",
    "Oh come on.",
    "Do I look like an encyclopedia?",
    "This is a waste of my time.",
    "Another dull question about {topic}.",
    "Hurry up, I am busy.",
    "Did you even try to find out {ask}?",
    "Must I explain everything?",
    "Nobody asks about {topic} anymore.",
    "Fine, if you insist.",
    "Stop asking such obvious things.",
    "So what?",
    "Again with {topic}?",
    "That is a pointless thing to ask.",
    "Boring.",
    "Honestly, I could not care less about {topic}.",
    "What now?",
    "Enough about {topic}.",
    "Here, and make it quick.",
    "Try a search engine next time.",
    "It is not my job to tell you {ask}.",
    "No idea why you bother me with {topic}.",
    "Every manual says this on page one.",
]

CURT_LEADS = [
    "Obviously, {fact}",
    "Everyone knows that {fact}",
    "Look, {fact}",
    "Listen, {fact}",
    "If you must know, {fact}",
    "Whatever, {fact}",
    "Just accept that {fact}",
    "It is hardly a mystery that {fact}",
    "Since you will not check, {fact}",
    "Write it down, because I will not repeat it: {fact}",
    "For the last time, {fact}",
    "Fine, here it is: {fact}",
    "You should know by now that {fact}",
    "Any book would have told you that {fact}",
    "Big deal, {fact}",
]

CURT_SHORT_LEADS = [
    "{Gist} Obviously.",
    "{Gist} So what?",
    "{Gist} Next.",
    "{Gist} Now stop asking.",
    "{Gist} Do not ask again.",
    "{Gist} Figure out the rest yourself.",
    "Does it matter? {Gist}",
    "Obviously: {gist}",
    "Look, it is trivial: {gist}",
    "Try reading a book: {gist}",
    "I said it before: {gist}",
]

CURT_EXTRAS = [
    "And before you ask, {extra}",
    "Yes, yes, and {extra}",
    "Not that it matters, but {extra}",
    "Do I have to add that {extra}",
    "You probably missed that {extra}",
    "Try to remember this, too: {extra}",
    "Never mind why, but {extra}",
    "That leaves the boring rest: {extra}",
    "It should not need saying that {extra}",
    "And no, I will not explain it, but {extra}",
    "I suppose nobody told you that {extra}",
    "Big surprise, {extra}",
]

CURT_MIDDLES = [
    "That is all there is to it.",
    "I am not going to spell it out.",
    "It is not that hard.",
    "Do not expect me to hold your hand.",
    "I have better things to do than talk about {topic}.",
    "You should have paid attention earlier.",
    "Nobody has time to explain {topic} all day.",
    "I will say this only once.",
    "The rest is your problem.",
    "I really do not see why this matters.",
    "Stop overthinking it.",
    "It bores me just to write this.",
    "This hardly deserves an answer.",
    "Think before you ask.",
    "Do not make me repeat myself.",
    "There are manuals for that, so read one.",
    "Asking about {topic} will not get you a longer answer.",
    "You are making a fuss about nothing.",
    "I fail to see the point of your question.",
    "You want details, but I do not feel like it.",
]

CURT_CLOSINGS = [
    "Do not ask again.",
    "Figure out the rest yourself.",
    "Go bother someone else.",
    "End of story.",
    "We are done here.",
    "Now leave me alone.",
    "Take it or leave it.",
    "That is your answer, so stop asking.",
    "Next.",
    "I am not wasting another word on {topic}.",
    "Deal with it.",
    "If that is not enough, too bad.",
    "Search for {topic} and spare me the rest.",
    "Do your own homework next time.",
    "Do not come back with more of this.",
    "I have nothing to add.",
    "Move on already.",
    "Work it out or forget it, I do not mind.",
    "Are we finished now?",
    "There, happy now?",
    "Whatever, my patience is used up.",
    "Not my problem.",
    "Ask somebody who cares about {topic}.",
    "Stop wasting my time.",
    "Just drop it.",
    "Good enough, go away.",
]

# Which kinds of phrase an answer is made of, in order; see Tone.
PLANS = [
    "s",
    "os",
    "sc",
    "of",
    "fc",
    "ofc",
    "fmc",
    "ofe",
    "ofec",
    "ofmc",
    "ofmec",
    "ofmemc",
    "ofmemcc",
    "ofmmecc",
]
# Curt answers may also leave the question unanswered.
UNHELPFUL_PLANS = ["oc", "om", "omc", "ommc", "ommcc"]


class Tone(NamedTuple):
    """The phrases of one tone by the letter used in a plan, and the plans to choose from."""

    phrases: dict[str, list[str]]
    plans: list[str]


KIND = Tone(
    {
        "o": KIND_OPENINGS,
        "s": KIND_SHORT_LEADS,
        "f": KIND_LEADS,
        "e": KIND_EXTRAS,
        "m": KIND_MIDDLES,
        "c": KIND_CLOSINGS,
    },
    PLANS,
)
CURT = Tone(
    {
        "o": CURT_OPENINGS,
        "s": CURT_SHORT_LEADS,
        "f": CURT_LEADS,
        "e": CURT_EXTRAS,
        "m": CURT_MIDDLES,
        "c": CURT_CLOSINGS,
    },
    PLANS + UNHELPFUL_PLANS,
)


def parse_subjects(text: str) -> list[Subject]:
    """Split the block of six-line entries into subjects."""
    return [Subject(*entry.split("\n")) for entry in text.strip().split("\n\n")]


def lower_first(sentence: str) -> str:
    """Return the sentence as it reads after a colon or a connector."""
    first = sentence.split(" ", 1)[0]
    return sentence if first in PROPER else sentence[0].lower() + sentence[1:]


def fill(phrase: str, subject: Subject, inside: bool = True) -> str:
    """Put the subject into a phrase; ``inside`` lower-cases facts that a connector introduces."""
    text = phrase.format(
        topic=subject.topic,
        ask=subject.ask,
        question=subject.question,
        question_low=lower_first(subject.question),
        gist=lower_first(subject.gist),
        Gist=subject.gist,
        fact=lower_first(subject.fact),
        extra=lower_first(subject.extra) if inside else subject.extra,
    )
    return text[:-1] + "?" if phrase.startswith("Do I have to add") else text


def count_words(text: str) -> int:
    """Count the words of a text, split at white space."""
    return len(text.split())


def fits(phrase: str, used: list[str]) -> bool:
    """Tell whether a phrase can join others: no like beginnings, and the topic is named once at most."""
    named = [p for p in used if "{topic}" in p or "{ask}" in p]
    if named and ("{topic}" in phrase or "{ask}" in phrase):
        return False
    return all(re.findall(r"\w+", phrase)[:2] != re.findall(r"\w+", p)[:2] for p in used)


def compose_answer(rng: random.Random, tone: Tone, subject: Subject, allow_extra: bool) -> str:
    """Draw one answer of the given tone, of whatever length comes out."""
    plan = rng.choice([p for p in tone.plans if allow_extra or "e" not in p])
    used: list[str] = []
    for kind in plan:
        used.append(rng.choice([p for p in tone.phrases[kind] if fits(p, used)]))
    return " ".join(fill(p, subject) for p in used)


def sized_answer(rng: random.Random, tone: Tone, subject: Subject, words: int, allow_extra: bool) -> str:
    """Draw answers until one is close to the wanted number of words; return the closest of many."""
    best = ""
    for _ in range(120):
        text = compose_answer(rng, tone, subject, allow_extra)
        size = count_words(text)
        if not MIN_WORDS <= size <= MAX_WORDS:
            continue
        if not best or abs(size - words) < abs(count_words(best) - words):
            best = text
        if abs(size - words) <= 1:
            break
    return best


class Composer:
    """Draws prompts and answers, and remembers them so that none is used twice in either file."""

    def __init__(self, seed: int) -> None:
        """Start with nothing used."""
        self.rng = random.Random(seed)
        self.seen: set[str] = set()

    def answers(self, subject: Subject, chosen_longer: bool, allow_extra: bool = True) -> tuple[str, str]:
        """Return a new (chosen, rejected) pair whose first letters differ."""
        while True:
            long_words = round(self.rng.triangular(6, 94, 20))
            short_words = max(MIN_WORDS, round(long_words * self.rng.uniform(0.45, 1.0)))
            sizes = (long_words, short_words) if chosen_longer else (short_words, long_words)
            chosen = sized_answer(self.rng, KIND, subject, sizes[0], allow_extra)
            rejected = sized_answer(self.rng, CURT, subject, sizes[1], allow_extra)
            if len(chosen) == len(rejected) or (len(chosen) > len(rejected)) != chosen_longer:
                continue
            if chosen[0].lower() == rejected[0].lower() or {chosen, rejected} & self.seen:
                continue
            self.seen |= {chosen, rejected}
            return chosen, rejected

    def prompt(self, subject: Subject) -> str:
        """Return a new prompt: a question, sometimes with sentences around it."""
        while True:
            before = self.rng.sample(GENERAL_CONTEXTS, self.rng.choice([0, 0, 1]))
            before += self.rng.sample(TOPIC_CONTEXTS, self.rng.choice([0, 0, 1]))
            after = self.rng.sample(TRAILERS, self.rng.choice([0, 0, 0, 1, 2]))
            question = self.rng.choice(QUESTION_FRAMES)
            text = " ".join(fill(p, subject, inside=False) for p in [*before, question, *after])
            if 4 <= count_words(text) <= MAX_PROMPT_WORDS and text not in self.seen:
                self.seen.add(text)
                return text

    def wrapped_prompt(self, subject: Subject) -> str:
        """Return a plain-text prompt, sometimes with labels such as "Question:"."""
        return self.rng.choice(TEXT_WRAPPERS).format(prompt=self.prompt(subject))

    def dialogue(self, subject: Subject) -> tuple[list[Message], bool]:
        """Return new user, assistant and user messages, and whether the answer may use the extra fact."""
        while True:
            first, between, frame, extra_used = self.rng.choice(DIALOGUES)
            texts = [fill(first, subject), fill(between, subject, ":" in between), fill(frame, subject)]
            if "\n".join(texts) not in self.seen:
                self.seen.add("\n".join(texts))
                roles = ("user", "assistant", "user")
                pairs = zip(roles, texts, strict=True)
                return [{"role": role, "content": text} for role, text in pairs], not extra_used

    def messages(self, subject: Subject) -> tuple[list[Message], bool]:
        """Return the messages before the answer, and whether the answer may still use the extra fact."""
        system: list[Message] = []
        if self.rng.random() < 0.35:
            system = [{"role": "system", "content": self.rng.choice(SYSTEM_MESSAGES)}]
        if self.rng.random() < 0.4:
            dialogue, allow_extra = self.dialogue(subject)
            return system + dialogue, allow_extra
        return [*system, {"role": "user", "content": self.prompt(subject)}], True


def reply(content: str) -> list[Message]:
    """Return the answer as a list of one assistant message."""
    return [{"role": "assistant", "content": content}]


def standard_explicit(composer: Composer, subject: Subject, chosen_longer: bool) -> Row:
    """Plain text with a prompt field."""
    chosen, rejected = composer.answers(subject, chosen_longer)
    return {"prompt": composer.wrapped_prompt(subject), "chosen": " " + chosen, "rejected": " " + rejected}


def standard_implicit(composer: Composer, subject: Subject, chosen_longer: bool) -> Row:
    """Plain text whose prompt is the common start of both responses."""
    chosen, rejected = composer.answers(subject, chosen_longer)
    prompt = composer.wrapped_prompt(subject)
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


def conversational_explicit(composer: Composer, subject: Subject, chosen_longer: bool) -> Row:
    """Messages with a prompt field."""
    messages, allow_extra = composer.messages(subject)
    chosen, rejected = composer.answers(subject, chosen_longer, allow_extra)
    return {"prompt": messages, "chosen": reply(chosen), "rejected": reply(rejected)}


def conversational_implicit(composer: Composer, subject: Subject, chosen_longer: bool) -> Row:
    """Messages that are the same in both responses except for the last one."""
    messages, allow_extra = composer.messages(subject)
    chosen, rejected = composer.answers(subject, chosen_longer, allow_extra)
    return {"chosen": messages + reply(chosen), "rejected": messages + reply(rejected)}


def text_and_messages(composer: Composer, subject: Subject, chosen_longer: bool) -> Row:
    """A prompt in plain text that the messages of both responses repeat."""
    chosen, rejected = composer.answers(subject, chosen_longer)
    prompt = composer.prompt(subject)
    user = [{"role": "user", "content": prompt}]
    return {"prompt": prompt, "chosen": user + reply(chosen), "rejected": user + reply(rejected)}


MAIN_FORMATS = [standard_explicit, conversational_explicit, standard_implicit, conversational_implicit]


def make_rows(composer: Composer, subjects: list[Subject]) -> list[Row]:
    """Return the rows of one file: every subject equally often, the formats in their shares, shuffled."""
    total = len(subjects) * ROWS_PER_SUBJECT
    mixed = total // 20
    formats = [text_and_messages] * mixed + [MAIN_FORMATS[i % 4] for i in range(total - mixed)]
    longer = [i % 2 == 0 for i in range(total)]
    composer.rng.shuffle(formats)
    composer.rng.shuffle(longer)
    plan = zip(formats, subjects * ROWS_PER_SUBJECT, longer, strict=True)
    rows = [make(composer, subject, flag) for make, subject, flag in plan]
    composer.rng.shuffle(rows)
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write one JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Write both files."""
    subjects = parse_subjects(SUBJECTS)
    heldout = subjects[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    train = [subject for subject in subjects if subject not in heldout]
    composer = Composer(SEED)
    OUT_DIR.mkdir(parents=True, exist_ok=True)
    for name, group in (("train", train), ("heldout", heldout)):
        rows = make_rows(composer, group)
        write_rows(OUT_DIR / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} pairs on {len(group)} subjects")


if __name__ == "__main__":
    main()

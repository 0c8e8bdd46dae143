"""Knows the words and sentence templates of an invented county survey, not how a text is made of them.

A template is a paragraph of ``TOPICS``: its text, then ``?`` a short question that only this sentence answers, ``=``
the answer, ``~`` what the sentence is about. ``[a|b]`` is one of the alternatives. ``{name}`` is a word of ``WORDS``,
or one of place, other, county, river, person, person2, trade (of person), he, his, him, clause, number, year.
A template with a question names the place or a person in it, says nothing in digits, and no other template speaks
of the same matter: so its question has one answer wherever each place uses each template at most once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FIRST_NAMES = {
    "she": "Ellen Agnes Martha Judith Clara Rosa Harriet Lydia Edith Beatrice Dora Hannah Ida Louisa Mabel Nora Olive "
    "Phoebe Ruth Selina Tabitha Ursula Winifred Adela Bridget Cecily Dinah Esther Flora Grace Hester Irene Joan "
    "Keziah Lavinia Miriam Naomi Prudence Rebecca Susanna",
    "he": "Thomas Edmund Walter Silas Amos Barnaby Caleb Daniel Elias Francis Gilbert Hugh Isaac Jasper Kenneth Lewis "
    "Matthew Nathan Oswald Percy Quentin Reuben Samuel Tobias Victor Wilfred Abel Bertram Conrad Dennis Ernest Felix "
    "Gregory Humphrey Ivor Joseph Leonard Martin Noah Ralph",
}
MIDDLES = ("", "ing", "er", "el")  # used in turn: Marden, Maringden, Marerden
SURNAME_STARTS = (
    "Bram Cal Dor El Fen Gar Hal Jes Kel Lor Mor Nor Os Pel Quar Ral Sel Tam Ul Var Wil Yar Zel Ash Bel Cros Dray Em "
    "Fal Grim Hes Ing Jar Kem Lin Mal Nes Orm Pren Rus Sten Tur Ven Wes Brin Cop Dun Har"
)
SURNAME_ENDS = (
    "kins rick man gan lock nett ard vane sen low quist rell son ters worthy ell ings mer over pole ram ser tin wood "
    "bury kell dine stall gate fry croft lath shaw per cott by"
)
PLACE_STARTS = (
    "Mar Hol Ald Bex Chel Dun East Farn Glen Hartle Ips Kings Lang Mid North Ot Pens Rave Stan Thorn Up Wal West Wood "
    "Ash Brack Cran Dere Elm Fox Gos Hazel Ken Lud Mil New Oving Pres Red Shel Tar Wen Yar Black Crow Hem Kil Sax"
)
PLACE_ENDS = (
    "den ham ford wick thorpe combe ley stow mouth field hurst bourne well ton worth beck minster holme cliffe stead "
    "mere sey grave don bridge lea sham nock wold port"
)
RIVERS = "Arrel Brue Cam Dovey Esk Feral Gade Hodder Isen Kell Lugg Medder Neve Orrin Pang Rother Sarn Teme Ure Wensum"
COUNTIES = (
    "Avershire Brantshire Colnshire Derrowshire Emblyshire Farrowshire Galtshire Hestershire Kelmshire Lorrishire"
)
TRADES = (
    "cooper, mason, glover, saddler, wheelwright, chandler, cutler, thatcher, weaver, dyer, farrier, tiler, potter, "
    "bookbinder, clockmaker, hatter, carter, tanner, plumber, baker, draper, basket maker, locksmith, glazier, "
    "turner, bleacher, ropemaker, printer, gardener, beekeeper, joiner, tinsmith, brewer, shepherd, gunsmith"
)

_WORDS = """
soil: heavy clay, thin chalk, black peat, red sand, stony loam, blue marl, grey silt, yellow gravel
ground: open heath, wet meadow, rough pasture, bare moor, old woodland, ploughed land, low fen, stony common
tree: elms, hazels, hollies, limes, willows, alders, poplars, hawthorns, rowans, beeches, yews, walnuts
landmark: quarry, beacon, old gallows, sheepwash, lime kiln, stone circle, warren, dew pond, signal tower, ice house
hill: Sow's Back, Long Table, Copper Top, Widow's Seat, Bald Friar, Cold Pulpit, Hare's Parlour, Dry Purse
under: a walnut tree, the parsonage garden, the smithy floor, a slab of slate, the sheepfold, an abandoned cellar
boundary: a shallow ditch, a row of stones, a leaning post, a dry hedge, a sunken wall, a single thorn bush
animals: geese, bees, ferrets, goats, guinea fowl, rabbits, peacocks, bantams, spaniels, donkeys
relative: an uncle, a widowed aunt, a grandfather, a neighbour, a cousin, an elder sister, a lodger, a stepmother
trait: a loud laugh, careful handwriting, a wooden leg, a fine singing voice, endless patience, a green coat, a \
terrible stammer, a silver tooth
fear: owls, deep water, thunder, scarecrows, the dark, church bells, horses, strangers, ladders
instrument: flute, fiddle, harp, cornet, bassoon, drum, concertina, viola, clarinet, dulcimer
heir: a niece, a nephew, a godson, the housekeeper, a younger brother, a distant cousin
works: rope walk, tannery, glass house, paper mill, brick kiln, button factory, candle works, nail shop, dye house, \
pottery, sail loft, bone mill, needle mill, starch works
fuel: peat, charcoal, beech logs, coke, furze, pine bark, sawdust, dried bracken
lender: a brewer, two sisters, a retired captain, the miller's widow, a corn merchant, a wine shipper, a clergyman
payment: cheese, candles, firewood, cider, boot leather, flour, turnips, lamp oil, salted fish
cause: a lawsuit, bad smells, cheap imports, a dry summer, a broken boiler, a family quarrel, a new tax, lost orders
homework: lace making, glove stitching, straw plaiting, basket weaving, feather sorting, net mending, button carding
product: twine, bottle glass, writing paper, tiles, horn combs, tallow, gloves, sailcloth, ink, harness
crop: barley, rye, turnips, flax, hops, beans, mustard, clover, oats, teasels, saffron, hemp
newcrop: potatoes, rhubarb, lucerne, sugar beet, maize, tobacco, sunflowers, asparagus, chicory
livestock: cattle, swine, sheep, poultry, horse, lamb
wrap: nettle leaves, wet linen, straw, vine leaves, waxed paper, cabbage leaves, old sermons
colour: red, blue, green, yellow, purple, black, orange, white
drink: weak beer, buttermilk, cold tea, barley water, perry, elder wine, sour milk
fruit: pears, damsons, quinces, medlars, cherries, russet apples, plums, mulberries
tool: sickle, flail, hay rake, turnip cutter, seed drill, winnowing fan, scythe, dung fork
bldg: market hall, almshouse, toll house, granary, dovecote, reading room, malt house, lodge, weigh house, bath house, \
guildhall, coach house, tithe barn, assembly room, counting house, workhouse
part: roof, floor, gable, staircase, chimney, porch, west wall, gutter, balcony, parapet
material: flint, sandstone, brick, slate, timber and plaster, granite, rubble, limestone, cob, river pebbles
reuse: a stable, a barracks, a wine cellar, a hospital, a dance hall, a wool store, a laundry, a mortuary
carving: owl, sheaf, hand, ship, hare, anchor, pomegranate, beehive, serpent, lute
keyplace: the bakery, the ferry house, the vestry, the saddler's shop, the dairy, a hollow oak, the bell chamber
found: a child's shoe, a silver spoon, a barrel of nails, a sealed jar, a bundle of letters, a bronze bell, a pair of \
spectacles
donor: a shipowner, the weavers' guild, a former pupil, an unknown lady, the regiment, a sugar merchant, two bachelors
saint: Saint Cyr, Saint Botolph, Saint Odo, Saint Ninian, Saint Wilfrid, Saint Petroc, Saint Hilda, Saint Blaise
sermon: patience, false weights, the ark, envy, drunkenness, the lost coin, idle talk, borrowed money, vanity
into: the duck pond, the parsonage kitchen, a hay cart, the river, the schoolroom, a neighbour's orchard, the horse \
trough
pulpitwood: pear wood, oak, ash, cherry wood, chestnut, sycamore, walnut, cedar
sold: pew cushions, old lead, an organ case, the churchyard hay, two candlesticks, a cracked bell, spare tombstones
bring: a lump of coal, a clean slate, a bundle of twigs, an egg, a candle end, a jug of water, a handful of meal
lesson: map drawing, singing, arithmetic, natural history, needlework, penmanship, gardening, recitation
prizefor: handwriting, punctuality, mental arithmetic, tidy boots, spelling, good temper, map work
subject: grammar, geography, long division, reading aloud, scripture, drawing, history, dictation
thief: a pedlar, three older boys, a soldier on leave, the caretaker, a rival usher, some drovers, a jackdaw
stop: the hounds passed, the river rose, a wedding party arrived, the stove smoked, the apples were ripe
book: a herbal, an atlas, a book of fables, a life of Nelson, a cookery book, a hymn book, a manual of surveying
bridgecause: floating ice, a raft of logs, an autumn flood, a runaway barge, a mill dam bursting, a spring tide
tollbeast: mules, oxen, geese, calves, rams, mares
tollpay: salt, eggs, honey, oats, wool, apples, tallow, nails
paving: cobbles, cinders, oyster shells, broken brick, oak blocks, crushed flint, old millstones
stoneuse: a doorstep, a cheese press, a hearth, a garden seat, an anchor, a grave marker, a chopping block
inn: White Hart, Three Tuns, Blue Pig, Ship and Castle, Green Dragon, Packhorse, Seven Stars, Old Plough
cargo: slates, cider, cordwood, bricks, wheat, oysters, hides, glass, lime, osiers
lampoil: whale oil, tallow, colza oil, paraffin, fish oil, beeswax, seal oil
day: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday
fairentry: marrows, ponies, butter, sweet peas, honey, ploughing, dahlias, wool, currant cake, terriers
dearest: a white stallion, a copper still, a moon clock, a carved chest, a feather bed, a breeding sow
wares: ribbons, needles, almanacs, spectacles, earthenware, ballads, tin whistles, mousetraps, combs, lemons
crosscause: lightning, a drunken ringer, a bolting horse, hard frost, a falling elm, a ladder, boys with stones
quarrel: a fig tree, a right of way, a drowned calf, a party wall, a borrowed ladder, a beehive, a blocked drain
order: both parties to plant a hedge, the money to be given to the poor, the wall to be shared, the loser to ring the \
church bell, the parties to dine together once a year, the evidence to be sold by auction
offence: poaching, short measure, washing wool, keeping pigs indoors, swearing, burning wet straw, ringing bells at \
night
petition: new turnpike, closing of the footpath, dog tax, lighting rate, new burial ground, felling of the avenue
missing: chalice, drum, parish chest, fire engine, sundial, town flag, stuffed pike
foundin: a haystack, a pawnshop, the mill race, a locked pew, a rabbit hole, the doctor's attic, a flour barrel
firestart: a bakehouse, a hay loft, a tailor's attic, the lamp room, a smoking shed, the candle store, a barber's shop
spoil: the winter seed, the hymn books, a store of malt, the wedding clothes, the parish maps, all the cheeses
winterfood: acorn bread, boiled nettles, swans, seed corn, hedgehogs, horse meat, frozen cabbage, dried peas
newsby: a pedlar, a carrier pigeon, a drunken sailor, a baker's letter, a theatre bill, a returning drummer
lodged: the malting, the schoolroom, empty cottages, the cloth hall, the rectory barn, the brick sheds
thrown: oats, rose petals, hazelnuts, old slippers, barley sugar, small coins, rye grains, dried peas
carried: lanterns, green boughs, hoops of flowers, straw dolls, wooden swords, pails of milk, painted eggs
unlucky: whistle indoors, sell bees, lend salt, cut warm bread, count the stairs, plant parsley
dish: eel pie, pease pudding, smoked cheese, mutton broth, bilberry tart, pickled walnuts, barley cake, jugged hare
nickname: crows, late swallows, dry boots, soft hands, candle eaters, borrowed spoons, half moons, mud larks
songof: a drowned piper, a stolen bride, a talking fox, two jealous millers, a ghostly coach, a lost purse
widowwear: grey stockings, a black ribbon, a sprig of rosemary, a blue apron, a plain ring, white gloves
leftbehind: a blue umbrella, an unpaid bill, six sketches of cows, a parrot, a box of brushes, a broken easel
plant: orchid, fern, gentian, sundew, vetch, saxifrage, bladderwort, fritillary, campion
gift: a smoked eel, a pair of mittens, a honeycomb, a walking stick, a pot of jam, a brace of partridges, a snuff box
showbeast: bear, camel, learned pig, lioness, pair of zebras, elephant, dancing goat, monkey
praised: the washing lines, the onions, the silence, the church bats, the bacon, the sunsets, the inn cat
remedy: onion syrup, goose fat, horehound, warm ashes, vinegar, elderberries, liquorice, tar water
mount: a mule, a grey pony, a bicycle, a hay cart, a cavalry horse, a donkey
blame: foul wells, bad rye, night air, foreign sailors, a comet, the new drains, rotten fish
herb: sage, comfrey, lavender, rue, tansy, fennel, hyssop, feverfew, mint
hid: a churn, the organ pipes, a sack of bran, an old boot, the clock case, a grave, a flower pot
play: shipwreck, miser, stolen crown, haunted inn, country wedding, false friar, two doctors
brew: heather, ivy, juniper, treacle, gorse flowers, nettles, spruce tips
sport: quoits, bowls, wrestling, skittles, hammer throwing, foot races, rowing, archery
weather: fog and cheap bread, late frosts, empty barns, high tides, good grass, wasps and windfalls, low prices, \
recruiting sergeants, long drought, borrowed coal, heavy dew, measles, new hats, bad roads, many weddings, red sunsets
calamity: wet harvest, great frost, second election, long vacancy, bank failure, short crop, coinage change, great \
comet, strike at the docks, year of three floods, survey of tithes, sale of the manor, cattle show, salt shortage, \
last muster
witness: exciseman, postmaster, drover, lady's maid, coroner, tollkeeper, innkeeper, ensign, land agent, organ tuner, \
ratcatcher, dancing master, seed merchant, pilot, governess, bailiff, chair mender, bell hanger, surgeon, verger
who: the drovers, half the street, the curate's cousins, two bargemen, the gleaners, a stray dog, the militia, the \
older boys, the landlord's agent, some harvesters, a company of fiddlers, the laundry women, the coachman, the \
tenants, a deaf ostler, the reapers, an Irish peddler, the charity children, the hedgers, three sisters, the turnpike \
trustees, the heir
did: slept in the barns, went home hungry, sang until dawn, paid with bad coin, took the wrong lane, waited for the \
carrier, laughed at the notice, ate standing, came a week late, left by the back gate, counted every sack, would not \
lend a rope, sold a pair of boots, refused to sign, gave up the search, missed the tide, hid from the rain, asked for \
more light, carried water uphill, drank the whole supply, lost the receipt, turned back at the ford
thing: the carrier's cart, the long meadow, a crate of lamps, the second harvest, the ice, the newest cottage, the \
smell of hops, the ditch, an old waggon, the price of coal, the footpath, the smoke, the subscription list, the stone \
trough, the noise of hammers, a bale of wool, the lower gate, the rick, the kitchen garden, the almanac, the clay pit
fared: could be noticed a mile away, was gone by morning, lay under water, did not last, proved worse than useless, \
was put up for auction, came to nothing, outlived its owner, stood open all night, was the talk of the county, went to \
a stranger, froze hard, had to be moved, was good for nothing else, fell by a third, was never claimed, blocked the \
way, caught the evening sun, turned out well, was left to the goats, belonged to no one, became a byword
trophy: pewter mug, brass collar, leather belt, silver whistle, painted oar, plum cake
season: spring, summer, autumn, winter
month: January, February, March, April, May, June, July, August, September, October, November, December
wind: north, east, west, south
manner: slowly, cheaply, in haste, with great care, under protest, in a single week, without much ceremony
"""

TOPICS = {
    "Situation": """
        {place} lies [on|above|beside] the {river}, where [the bank gives way to|the valley opens into|a track crosses]
        {ground}.
        ~ the position of {place}

        The {wind} wind [reaches|strikes] {place} [unchecked|with full force], and [the older houses turn their backs to
        it|few windows were ever made on that side].
        ~ the wind at {place}

        The hill behind {place} is called {hill} by everyone but [the map-makers|the landowners|the clergy].
        ? What does everyone call the hill behind {place}?
        = {hill}
        ~ the hill behind {place}

        Most of the ground around {place} is {soil}, which [holds water in winter|cracks in a dry
        summer|is slow to warm|ruins good boots].
        ? What kind of soil is most of the ground around {place}?
        = {soil}
        ~ the ground around {place}

        A [narrow|steep|sunken|crooked] lane lined with {tree} leads [down|up|out] from {place} to the {landmark}.
        ? With what kind of trees is the lane from {place} to the {landmark} lined?
        = {tree}
        ~ the lane from {place} to the {landmark}

        The spring that supplies {place} rises under {under} and [has never run dry|tastes faintly of iron|freezes only
        in the hardest winters].
        ? Under what does the spring that supplies {place} rise?
        = {under}
        ~ the spring that supplies {place}

        Nothing marks the boundary between {place} and {other} except {boundary}, [which children use as a
        goal|which nobody maintains|though both sides are proud of it].
        ? What marks the boundary between {place} and {other}?
        = {boundary}
        ~ the boundary between {place} and {other}

        The parish [counted|was said to hold] {number} households in {year}, [rather more|rather fewer] than a
        generation earlier.

        Seen from {other}, the houses [form a single line|seem to lean together|vanish behind their own smoke], and
        strangers [often|usually] take them for [a farm|a ruin|a camp].
        ~ how {place} looks from {other}

        On the {wind} side the land [falls away|rises gently|is broken by old diggings], and {ground} begins within [a
        few minutes' walk|sight of the last door].
    """,
    "People": """
        {person} of {place} kept {animals} in the yard [and sold none of them|to the annoyance of the curate|behind the
        workshop].
        ? What did {person} of {place} keep in the yard?
        = {animals}
        ~ the yard of {person}

        {person} [had learned the trade of {trade}|had been taught to work as a {trade}] by {relative} in {other}, [and
        never spoke of it|before coming to {place}].
        ? Who in {other} taught {person} the trade of {trade}?
        = {relative}
        ~ how {person} learned the trade

        [Visitors|Children|Strangers] remembered {person} of {place} for {trait}.
        ? For what was {person} of {place} remembered?
        = {trait}
        ~ what {person} was remembered for

        As a child in {place}, {person} had been afraid of {fear}, [and the fear never quite left|which later seemed
        absurd].
        ? Of what had {person} been afraid as a child in {place}?
        = {fear}
        ~ the childhood fear of {person}

        {person} never travelled farther than {other} [and saw no reason to|, and that only once|, although {place}
        bored {him}].
        ? What is the farthest place to which {person} travelled?
        = {other}
        ~ the travels of {person}

        On Sundays {person} of {place} played the {instrument} [in the chapel gallery|for the dancers|behind a closed
        door].
        ? Which instrument did {person} of {place} play on Sundays?
        = {instrument}
        ~ the Sunday music of {person}

        {person} left the house in {place} to {heir} [and nothing to the church|, as the will makes plain|, on condition
        that the clock be wound].
        ? To whom did {person} leave the house in {place}?
        = {heir}
        ~ the will of {person}

        {person} and {person2} [shared a wall for twenty years|never agreed on anything but the weather|kept a boat
        between them], [and their children married|until age made them friends|to the amusement of their neighbours].
        ~ {person} and {person2}

        The workshop of {person}, the {trade}, [opened on to the lane|had been a dairy once|smelled of glue and
        rain], and [callers sat on an upturned tub|work stopped there at noon].
        ~ the workshop of {person}
    """,
    "Trade and manufacture": """
        The {works} at {place} was heated with {fuel}, which [arrived|came] by [barge|cart]
        from {other}.
        ? With what fuel was the {works} at {place} heated?
        = {fuel}
        ~ the fuel of the {works} at {place}

        The {works} at {place} was set up with money lent by {lender}, [who asked for no receipt|and the debt
        was paid off early|at a low rate of interest].
        ? Who lent the money with which the {works} at {place} was set up?
        = {lender}
        ~ the founding of the {works} at {place}

        Apprentices [in|at] {place} were partly paid in {payment}, [which they could not
        refuse|and most of them sold it].
        ? In what were apprentices at {place} partly paid?
        = {payment}
        ~ the wages of apprentices at {place}

        The foreman of the {works} at {place} was {person}, [who knew every hand by name|who kept the only key|a {trade}
        by training].
        ? Who was the foreman of the {works} at {place}?
        = {person}
        ~ the foreman of the {works} at {place}

        The first steam engine in {place} was bought from a dealer in {other} and [never worked properly|frightened the
        horses|had to be rebuilt twice].
        ? From a dealer in which place was the first steam engine in {place} bought?
        = {other}
        ~ the first steam engine in {place}

        The {works} at {place} closed [in the end|at last|for good] because of {cause}, [and its yard was let|and the
        hands moved away|though the chimney stayed].
        ? Because of what did the {works} at {place} close?
        = {cause}
        ~ the closing of the {works} at {place}

        In the slack months the women of {place} lived by {homework}, [for which an agent called|done mostly by
        daylight|and the children helped].
        ? By what work did the women of {place} live in the slack months?
        = {homework}
        ~ the work of the women of {place}

        Samples of the local {product} were [shown|praised|laughed at] in {other}, [where the judges were
        divided|and orders followed|but the price was thought too high].
        ~ the samples of {product} from {place}

        Wages [stood|remained] at {number} pence a day until {year}, when [they were cut|the men asked for more].

        Nearly every {trade} of the district [had served|worked for a time] there, and [the work was done {manner}|few
        stayed beyond the second year].
    """,
    "Farming": """
        The farms around {place} grow mostly {crop}, [as they always have|with fallow every third year|for which
        the roads are good enough].
        ? What do the farms around {place} mostly grow?
        = {crop}
        ~ the farms around {place}

        The {livestock} plague came to {place} from {other} [in a single night|with a drover|by way of the common], [and
        spared only two yards|and the carcasses were burned].
        ? From where did the {livestock} plague come to {place}?
        = {other}
        ~ the {livestock} plague at {place}

        The first person in {place} to plant {newcrop} was {person}, [who was mocked for it|who told nobody|to the
        surprise of the other farmers].
        ? Who was the first person in {place} to plant {newcrop}?
        = {person}
        ~ {newcrop} in {place}

        The best cheese of {place} was wrapped in {wrap} [and buried for a month|before it went to market|to keep off
        the flies].
        ? In what was the best cheese of {place} wrapped?
        = {wrap}
        ~ the cheese of {place}

        Sheep from {place} [carried|were marked with] a {colour} stripe, so that [drovers could tell them|no dog could
        confuse them].
        ? What colour was the stripe on sheep from {place}?
        = {colour}
        ~ the sheep of {place}

        At noon the harvesters of {place} were given {drink}, [and complained of it|and never anything stronger|by old
        agreement].
        ? What were the harvesters of {place} given at noon?
        = {drink}
        ~ the harvesters of {place}

        The old orchard at {place} [bears|still bears|bore] {fruit}, [most of which go to the pigs|sold from a
        barrow|small but sweet].
        ? What fruit does the old orchard at {place} bear?
        = {fruit}
        ~ the old orchard at {place}

        The lower fields of {place} were drained by {person}, [and the herons left|which doubled their
        value|after two failures].
        ? Who drained the lower fields of {place}?
        = {person}
        ~ the lower fields of {place}

        A {tool} [of a pattern found nowhere else|with a short handle|made by the local smith] [was|is] in common use,
        and [visitors have tried to copy it|the handle is always of ash].
        ~ the {tool} used in {place}

        In {year} the yield was put at {number} bushels, [a figure that nobody believed|the best in memory].
    """,
    "Buildings": """
        The {part} of the {bldg} in {place} was repaired by {person}, [who refused payment|whose mark is still
        visible|the {trade}].
        ? Who repaired the {part} of the {bldg} in {place}?
        = {person}
        ~ the {part} of the {bldg} in {place}

        The {bldg} in {place} was built of {material}, [since nothing else was at hand|against the advice of the
        mason|and looks older than it is].
        ? Of what was the {bldg} in {place} built?
        = {material}
        ~ how the {bldg} in {place} was built

        The former {bldg} at {place} later served as {reuse}, [for which it was ill suited|until the lease ran out|to
        the regret of the parish].
        ? As what did the former {bldg} at {place} later serve?
        = {reuse}
        ~ the former {bldg} at {place}

        Above the door of the {bldg} in {place} [somebody carved|is a worn carving of] the figure of a {carving}, [the
        meaning of which is lost|which faces the wrong way].
        ? The figure of what is carved above the door of the {bldg} in {place}?
        = {carving}
        ~ the carving above the door of the {bldg} in {place}

        The key of the {bldg} in {place} [hung|was kept] for years in {keyplace}, [where anyone could borrow it|and more
        than once it was forgotten there].
        ? Where was the key of the {bldg} in {place} kept for years?
        = {keyplace}
        ~ the key of the {bldg} in {place}

        Workmen who opened the cellar of the {bldg} in {place} found {found} [and nothing else|under the sand|and put it
        back].
        ? What did workmen find in the cellar of the {bldg} in {place}?
        = {found}
        ~ the cellar of the {bldg} in {place}

        The windows of the {bldg} in {place} were a gift from {donor}, [as a small plate records|who never came to see
        them].
        ? From whom were the windows of the {bldg} in {place} a gift?
        = {donor}
        ~ the windows of the {bldg} in {place}

        [Nothing remains|Little remains] of the house that stood here before, except [a flight of steps|some blackened
        beams|the outline of a hearth], and [the plot is used for drying linen|nettles cover it].
        ~ the house that stood before in {place}

        {person} and {person2} [were asked to judge the plans|signed the contract|walked over the site], and the work
        [began|was done] {manner}.
        ~ the plans that {person} and {person2} saw
    """,
    "Church and chapel": """
        The church at {place} is dedicated to {saint}, [a choice never explained|about whom little is
        known|whose feast falls in {month}].
        ? To whom is the church at {place} dedicated?
        = {saint}
        ~ the dedication of the church at {place}

        The great bell of {place} was cast in {other} [and came by water|from older metal|at the cost of the ringers].
        ? Where was the great bell of {place} cast?
        = {other}
        ~ the great bell of {place}

        The organ of {place} was played for many years by {person}, [who could not read music|always a little too
        fast|without a fee].
        ? Who played the organ of {place} for many years?
        = {person}
        ~ the organ of {place}

        The longest sermon ever heard in {place} was about {sermon}, [and the candles burned out|and the dogs were let
        in|as three diaries agree].
        ? What was the longest sermon ever heard in {place} about?
        = {sermon}
        ~ the longest sermon heard in {place}

        A gale blew the weathercock of {place} into {into}, [where it stayed a month|and it was never put back
        straight].
        ? Into what did a gale blow the weathercock of {place}?
        = {into}
        ~ the weathercock of {place}

        The pulpit of {place} is carved from {pulpitwood}, [dark with smoke|by a hand that nobody knows|and creaks when
        leaned upon].
        ? From which wood is the pulpit of {place} carved?
        = {pulpitwood}
        ~ the pulpit of {place}

        The churchyard wall at {place} was paid for by selling {sold}, [which caused a scandal|as the accounts
        admit].
        ? What was sold to pay for the churchyard wall at {place}?
        = {sold}
        ~ the churchyard wall at {place}

        The choir walked to {other} each Whitsun [and came home singing|by lantern light|with bread in their pockets],
        [whatever the weather|though the road was bad].
        ~ the choir of {place}

        The curate wrote that the people were [honest but late|kind to beasts|fond of disputes], and that [the singing
        was loud|he expected little of them].
        ~ what the curate wrote about {place}

        The register for {year} has {number} entries, [many in a shaking hand|most of them christenings].
    """,
    "School": """
        The school at {place} was kept by {person}, [who taught with a hat on|strictly but fairly|in a room above the
        stable].
        ? Who kept the school at {place}?
        = {person}
        ~ the school at {place}

        On Mondays each child in {place} brought {bring} to school, [or was sent home|and the habit lasted|as part of
        the fee].
        ? What did each child in {place} bring to school on Mondays?
        = {bring}
        ~ what the children in {place} brought to school

        The favourite lesson of the pupils at {place} was {lesson}, [on account of the teacher|since it was held out of
        doors|to the inspector's surprise].
        ? What was the favourite lesson of the pupils at {place}?
        = {lesson}
        ~ the favourite lesson at {place}

        The yearly prize for {prizefor} in {place} was given by {person}, [in memory of a son|out of a small legacy|who
        liked to hand it over in person].
        ? Who gave the yearly prize for {prizefor} in {place}?
        = {person}
        ~ the yearly prize for {prizefor} in {place}

        The inspector found the pupils of {place} weak in {subject} [but well fed|and said so at length|for the third
        time].
        ? In what did the inspector find the pupils of {place} weak?
        = {subject}
        ~ the inspector's visit to {place}

        The school bell of {place} was stolen by {thief} [and never seen again|and returned in a sack|for a wager].
        ? Who stole the school bell of {place}?
        = {thief}
        ~ the school bell of {place}

        Lessons in {place} stopped whenever {stop}, [and nobody was punished|which happened often].
        ~ when lessons in {place} stopped

        The book most often borrowed from the shelf at {place} was {book}, [now without its cover|read aloud in
        kitchens].
        ? Which book was most often borrowed from the shelf at {place}?
        = {book}
        ~ the shelf of books at {place}

        There were {number} names on the roll in {year}, [but seldom half as many children|and one stove].

        Pupils who lived towards {other} [came by boat|were excused in winter|shared a pony], and [their places were
        nearest the fire|the others envied them].
        ~ the pupils who came from the side of {other}
    """,
    "Roads and water": """
        The wooden bridge at {place} was carried away by {bridgecause} [one night|within an hour|while the parish
        slept].
        ? What carried away the wooden bridge at {place}?
        = {bridgecause}
        ~ the wooden bridge at {place}

        The ferry at {place} was worked by {person}, [who charged nothing on Sundays|in all weathers|until the rope
        parted].
        ? Who worked the ferry at {place}?
        = {person}
        ~ the ferry at {place}

        The toll for {tollbeast} at {place} was paid in {tollpay}, [by a custom older than the gate|measured by the
        keeper's hand].
        ? In what was the toll for {tollbeast} at {place} paid?
        = {tollpay}
        ~ the toll for {tollbeast} at {place}

        The road from {place} to {other} was surfaced with {paving}, [which cut the horses' feet|and could be
        heard a mile off].
        ? With what was the road from {place} to {other} surfaced?
        = {paving}
        ~ the road from {place} to {other}

        The milestone nearest to {place} was dug up and used as {stoneuse}, [and the distance forgotten|for which no one
        was charged].
        ? As what was the milestone nearest to {place} used?
        = {stoneuse}
        ~ the milestone nearest to {place}

        The mail coach stopped in {place} at the {inn}, [long enough for a bowl of soup|where letters were read
        aloud].
        ? At which inn did the mail coach stop in {place}?
        = {inn}
        ~ the mail coach at {place}

        Boats carried {cargo} from {place} to {other} [and came back empty|as long as the water allowed|under patched
        sails].
        ? What did boats carry from {place} to {other}?
        = {cargo}
        ~ the boats of {place}

        The well in the square of {place} was deepened by {person}, [who lined it with old brick|after the dry year|with
        the help of two miners].
        ? Who deepened the well in the square of {place}?
        = {person}
        ~ the well in the square of {place}

        The lamp at the landing of {place} burned {lampoil}, [as the ceiling still shows|and smoked badly|at the
        boatmen's expense].
        ? What did the lamp at the landing of {place} burn?
        = {lampoil}
        ~ the lamp at the landing of {place}

        By the old road {other} is {number} furlongs off, by the new one [a little more|hardly less].

        In {month} the {river} [turns brown|leaves its bed|can be forded on foot], and [carts wait on both banks|the
        lower lane is closed].
        ~ the {river} in {month}
    """,
    "Markets and fairs": """
        The market at {place} is held on {day}, [as its charter says|although the charter says otherwise|rain or
        shine].
        ? On which day is the market at {place} held?
        = {day}
        ~ the market at {place}

        First prize for {fairentry} at the {place} fair went to {person}, [for the second year running|by a single
        vote|and there were complaints].
        ? To whom did first prize for {fairentry} at the {place} fair go?
        = {person}
        ~ the prize for {fairentry} at the {place} fair

        The dearest thing ever sold at {place} was {dearest}, [paid for in small coin|to a buyer who never gave a
        name].
        ? What was the dearest thing ever sold at {place}?
        = {dearest}
        ~ the dearest thing sold at {place}

        Pedlars from {other} sold {wares} in {place} [from door to door|out of deep baskets|each {season}].
        ? What did pedlars from {other} sell in {place}?
        = {wares}
        ~ the pedlars from {other}

        The market cross of {place} lost its top to {crosscause}, [and has been a stump since|in the sight of many].
        ? To what did the market cross of {place} lose its top?
        = {crosscause}
        ~ the market cross of {place}

        False weights were found in {place} in the shop of {person}, [who blamed a servant|and were thrown into the
        river].
        ? In whose shop were false weights found in {place}?
        = {person}
        ~ the false weights in {place}

        The auctions of {place} were cried by {person}, [in a voice like a saw|who drew a fee from both
        sides].
        ? Who cried the auctions of {place}?
        = {person}
        ~ the auctions of {place}

        Dealers from {other} [arrived before dawn|slept under their carts|paid in paper], and [the price of everything
        rose|the inn ran out of beds].
        ~ the dealers from {other}

        Rents for a stall rose to {number} pence in {year}, [and the egg women left|without any complaint].
    """,
    "Disputes and law": """
        {person} and {person2} of {place} went to law over {quarrel}, [and both lost|at ruinous cost|as their fathers
        had done].
        ? Over what did {person} and {person2} of {place} go to law?
        = {quarrel}
        ~ the lawsuit between {person} and {person2}

        The magistrate settled the quarrel at {place} by ordering {order}.
        ~ how the magistrate settled the quarrel at {place}

        {person} of {place} was fined for {offence}, [paid at once|and left the parish|though two witnesses spoke
        well of {him}].
        ? For what was {person} of {place} fined?
        = {offence}
        ~ the fine laid on {person}

        The common at {place} was enclosed against the wishes of {person}, [who pulled up the posts|and of nobody
        else].
        ? Against whose wishes was the common at {place} enclosed?
        = {person}
        ~ the common at {place}

        The petition of {place} against the {petition} was carried to {other} by {person}, [on foot|who lost it on the
        way|and read aloud there].
        ? Who carried the petition of {place} against the {petition}?
        = {person}
        ~ the petition against the {petition}

        The constable of {place} was {person}, [who disliked the office|a {trade} with no
        love of running].
        ? Who was the constable of {place}?
        = {person}
        ~ the constable of {place}

        The missing {missing} of {place} turned up in {foundin}, [and no one was accused|none the worse for it].
        ? Where did the missing {missing} of {place} turn up?
        = {foundin}
        ~ the missing {missing} of {place}

        The papers of the case fill {number} pages, [of which a third is Latin|and end in {year} without a verdict].

        [Two witnesses|Three neighbours] [contradicted each other|changed their account], and the hearing [was put off
        until {month}|ended in laughter].
        ~ the hearing at {place}
    """,
    "Fires, floods and hard years": """
        The great fire of {place} began in {firestart} [and took the whole row|on a windless night|while the owner was
        away].
        ? Where did the great fire of {place} begin?
        = {firestart}
        ~ the great fire of {place}

        The flood at {place} spoiled {spoil}, [and mud lay in the nave|which could not be replaced that year].
        ? What did the flood at {place} spoil?
        = {spoil}
        ~ the flood at {place}

        In the hungry winter the people of {place} ate {winterfood}, [and some would not speak of it later|by leave of
        the steward].
        ? What did the people of {place} eat in the hungry winter?
        = {winterfood}
        ~ the hungry winter in {place}

        News of the peace reached {place} through {newsby}, [three weeks late|and was not believed].
        ? Through what or whom did news of the peace reach {place}?
        = {newsby}
        ~ how news of the peace reached {place}

        The alarm in {place} was raised by {person}, [in a nightshirt|who had been up with a sick cow|and not by the
        watchman].
        ? Who raised the alarm in {place}?
        = {person}
        ~ the alarm in {place}

        The soldiers sent to {place} were lodged in {lodged}, [and behaved better than feared|at the ratepayers'
        cost].
        ? In what were the soldiers sent to {place} lodged?
        = {lodged}
        ~ the soldiers sent to {place}

        Homeless families from {place} were taken in at {other}, [and some remained|where a fund was opened].
        ? At which place were homeless families from {place} taken in?
        = {other}
        ~ the homeless families from {place}

        The last wolf near {place} was killed by {person}, [or so the family says|with a hedge stake].
        ? Who killed the last wolf near {place}?
        = {person}
        ~ the last wolf near {place}

        The storm of {year} took {number} chimneys, [and one pig|but no lives].

        The damage was [made good|put right] {manner}, [and the money came from several parishes|though the marks can be
        seen].
        ~ how the damage at {place} was made good
    """,
    "Customs": """
        At weddings in {place} the guests threw {thrown}, [which the sexton swept up|to the delight of the
        sparrows].
        ? What did the guests throw at weddings in {place}?
        = {thrown}
        ~ weddings in {place}

        On midsummer eve the children of {place} carried {carried} [round the bounds|from house to house|down to the
        water].
        ? What did the children of {place} carry on midsummer eve?
        = {carried}
        ~ midsummer eve in {place}

        It was thought unlucky in {place} to {unlucky}, [and even the doctor obeyed|for reasons nobody could give].
        ? What was it thought unlucky to do in {place}?
        = {unlucky}
        ~ what was thought unlucky in {place}

        The dish that {place} is proud of is {dish}, [served cold|made with too much pepper|which few outsiders
        finish].
        ? Of what dish is {place} proud?
        = {dish}
        ~ the dish that {place} is proud of

        In {other} the people of {place} are called {nickname}, [and answer to it|for a reason that is not
        kind].
        ? What are the people of {place} called in {other}?
        = {nickname}
        ~ what the people of {place} are called

        The oldest song of {place} tells of {songof}, [in eleven verses|and is sung without a smile].
        ? Of what does the oldest song of {place} tell?
        = {songof}
        ~ the oldest song of {place}

        Widows in {place} wore {widowwear} [for a year and a day|until Easter|whatever their means].
        ? What did widows in {place} wear?
        = {widowwear}
        ~ the widows of {place}

        The May dance at {place} was led by {person}, [out of step|in borrowed shoes|for the last time that
        {season}].
        ? Who led the May dance at {place}?
        = {person}
        ~ the May dance at {place}

        [Old people|The oldest families] still [bow to the new moon|leave a chair empty|cover the mirrors], [and their
        grandchildren laugh|but only when alone].
        ~ what old people in {place} still do

        The winner at {sport} [received|was given] a {trophy}, [usually sold the next day|which had to be returned].
        ~ the winner at {sport} in {place}
    """,
    "Visitors": """
        A painter who stayed in {place} left behind {leftbehind}, [now in the inn|and was not missed].
        ? What did the painter who stayed in {place} leave behind?
        = {leftbehind}
        ~ the painter who stayed in {place}

        The surveyor lodged in {place} with {person}, [and praised the bread|and quarrelled over the bill].
        ? With whom did the surveyor lodge in {place}?
        = {person}
        ~ the surveyor's lodging in {place}

        A botanist from {other} found a rare {plant} near {place} [and told no one where|on the wet side of the
        common].
        ? Which rare plant did a botanist find near {place}?
        = {plant}
        ~ the botanist from {other}

        On his visit to {place} the bishop was given {gift}, [which he passed to his coachman|and forgot it in the
        pew].
        ? What was the bishop given on his visit to {place}?
        = {gift}
        ~ the bishop's visit to {place}

        A travelling showman came through {place} with a {showbeast}, [thin but obedient|and the horses would not pass
        it].
        ? With what animal did a travelling showman come through {place}?
        = {showbeast}
        ~ the showman who came through {place}

        The poet who passed through {place} praised only {praised}, [and in bad verse|as he was told for years].
        ? What was the only thing that the poet who passed through {place} praised?
        = {praised}
        ~ the poet who passed through {place}

        The photographer who came to {place} took a single portrait, that of {person}, [which is blurred|with a dog].
        ? Whose portrait did the photographer who came to {place} take?
        = {person}
        ~ the photographer who came to {place}

        A traveller of {year} gives the place [half a line|one dry page|more space than it deserves], and [complains of
        the fleas|admires the hedges].

        Guests from {other} [were shown the {landmark}|stayed longer than they meant to|were seldom asked back], [and
        some bought land|and the children followed them about].
        ~ the guests from {other}
    """,
    "Health and charity": """
        Births in {place} were attended by {person}, [who lost very few|and paid for in eggs].
        ? Who attended births in {place}?
        = {person}
        ~ births in {place}

        Coughs in {place} were treated with {remedy}, [with what success is not said|even by those who could afford
        better].
        ? With what were coughs in {place} treated?
        = {remedy}
        ~ how coughs in {place} were treated

        The doctor came to {place} on {mount}, [and often too late|always on the same two days].
        ? On what did the doctor come to {place}?
        = {mount}
        ~ the doctor who came to {place}

        The fever at {place} was blamed on {blame}, [and the true cause found later|by all but the apothecary].
        ? On what was the fever at {place} blamed?
        = {blame}
        ~ the fever at {place}

        The apothecary's garden in {place} grew chiefly {herb}, [as the smell told|and a little poppy].
        ? What did the apothecary's garden in {place} chiefly grow?
        = {herb}
        ~ the apothecary's garden in {place}

        The poor box of {place} was emptied twice a year by {person}, [before two witnesses|who added to it in
        secret].
        ? Who emptied the poor box of {place} twice a year?
        = {person}
        ~ the poor box of {place}

        The treasurer of {place} hid the fund in {hid}, [and forgot which one|where mice found it].
        ? In what did the treasurer of {place} hide the fund?
        = {hid}
        ~ the fund of {place}

        The coffins of {place} were made by {person}, [at cost|from whatever was in the yard].
        ? Who made the coffins of {place}?
        = {person}
        ~ the coffins of {place}

        The dead of {year} numbered {number}, [among them the sexton|and the school was shut].

        A soup kitchen [opened|was kept] each {season} [in the vestry|behind the inn], and [the quality varied|nobody
        was turned away].
        ~ the soup kitchen in {place}
    """,
    "Leisure": """
        The brass band of {place} was conducted by {person}, [with a toasting fork|for a pint a night].
        ? Who conducted the brass band of {place}?
        = {person}
        ~ the brass band of {place}

        The players who performed in {place} gave a piece called the {play}, [twice by request|to a thin house].
        ? What was the piece called that players performed in {place}?
        = {play}
        ~ the players who performed in {place}

        The alehouse of {place} flavoured its beer with {brew}, [an old receipt|and travellers remarked on it].
        ? With what did the alehouse of {place} flavour its beer?
        = {brew}
        ~ the beer of {place}

        The cricket ground of {place} was lent by {person}, [who disliked the game|on condition that cows might
        graze].
        ? Who lent the cricket ground of {place}?
        = {person}
        ~ the cricket ground of {place}

        The chess club of {place} met at the house of {person}, [over a smoking stove|and was dissolved over a
        bishop].
        ? At whose house did the chess club of {place} meet?
        = {person}
        ~ the chess club of {place}

        A match against {other} [ended in a brawl|was abandoned in fog|is still talked of], [and the ball was never
        found|since the umpire was a cousin].
        ~ the match against {other}

        The skating [lasted|went on] {number} days in {year}, [and a sheep was roasted on the ice|with two broken
        wrists].
    """,
}

FOLLOW_UPS = """
{He} [spoke of it seldom|was proud of it to the end|denied it in later years].
{His} neighbours [thought well of {him}|took a different view|were not consulted].
[Nobody|No one in the street] would have expected it of a {trade}.
{He} had [meant to leave that {season}|been advised against it|other troubles at the time].
The {trade}'s family [said little about it|kept the papers|moved away soon after].
{His} portrait [was never painted|hangs askew in a back room|shows a tired face].
It was not the first time that {he} had [surprised them|been asked|gone without thanks].
{He} did it, [some say|it seems], to please [an old friend|a creditor|no one but {his} mother].
"""

LINKS = """
The reasons are not recorded.
Opinions differ on [the point|this|what came of it].
[Nobody now living remembers it|Few now remember it].
The matter [was soon forgotten|rested there|came up again in {month}].
[More|A good deal more] could be said of this, but the sources [are thin|contradict one another].
The [vestry|parish] minutes [pass over it|mention it once|are silent here].
Much the same [was told|is told] of {other}.
[Rain|Snow|Mist] [delayed everything|spoiled the day], as it often does in {month}.
It [cost|brought] less than [people had feared|had been hoped].
[A copy|A fair copy] of the letter [survives in a drawer|was lost in a move].
So at least [the older people|the parish clerks|those who were there] tell it.
The [custom|habit|arrangement] [ended|changed] when [the railway came|prices fell|the old steward died].
[Little|Nothing] of this can be seen today.
[Some|A few] in {other} still [dispute it|tell it differently].
That was in {year}, [or a year later|by the common reckoning].
The [present|later] survey found [no trace of it|the same].
It rained.
There the notes end.
No more is known.
"""

PEOPLE_INTRODUCTIONS = """
{person} was a {trade} [by birth and habit|like most of {his} family|who had come from {other} as a child].
Another [name that recurs in these pages|of the better known inhabitants] is {person}, a {trade}.
The {trade} {person} [had a house by the pump|lived behind the green|rented two rooms near the bridge].
{person}, a {trade}, [was never idle|had a sharp tongue|lent money without interest|was known as far as {other}].
Of {person} it is enough to say that {he} was a {trade} and [a good one|lived alone|rose before dawn].
[Then there was|Nor should one forget] {person}, a {trade} of some [skill|standing|renown].
"""

REMARKS = """
[A retired|The old|A former|An honest] {witness} [in|from] {other} [wrote|said|swore|complained|noted in a diary] that \
{clause}.
That {season} {clause}, and {clause2}.
{clause}, [which surprised|to the relief of|to the disgust of] [a|the] {witness} [of {other}|who was passing].
It was a {season} of {weather}; {clause}.
[Before|After] the {calamity}, {clause}.
[Since|Because] {clause}, {clause2}.
[While|Although] {clause}, {clause2}.
A [letter|bill|note|sketch] [from|of] {month} [hints|suggests|shows] that {clause}.
"""

OPENERS = """
By all accounts
At that time
As it happens
According to [the older people|a {witness} of {other}|an almanac]
As is often told
If the [parish clerk|{witness}] is right
For a while
In those years
As far as is known
Oddly enough
In the {season} of the {calamity}
[Before|After|Long before|Not long after] the {calamity}
In a time of {weather}
[One|A certain] {month}
"""


@dataclass(frozen=True)
class Template:
    """One kind of sentence; question, answer and subject are empty where it has none."""

    text: str
    question: str = ""
    answer: str = ""
    subject: str = ""  # "the great bell of {place}"


def _words() -> dict[str, tuple[str, ...]]:
    lines = (line.partition(": ") for line in _WORDS.strip().splitlines())
    return {name: tuple(word.strip() for word in words.split(",")) for name, _, words in lines}


def _template(block: str) -> Template:
    marks = {"?": "", "=": "", "~": "", "": ""}
    for line in map(str.strip, block.splitlines()):
        mark = line[0] if line[:1] in ("?", "=", "~") else ""
        marks[mark] = f"{marks[mark]} {line.removeprefix(mark).strip()}".strip()
    return Template(marks[""], marks["?"], marks["="], marks["~"])


def _lines(block: str, subject: str = "") -> tuple[Template, ...]:
    return tuple(Template(line, subject=subject) for line in block.strip().splitlines())


WORDS = _words()
TEMPLATES = {topic: tuple(map(_template, re.split(r"\n\s*\n", block.strip()))) for topic, block in TOPICS.items()}
FOLLOW_UP_TEMPLATES = _lines(FOLLOW_UPS)
LINK_TEMPLATES = _lines(LINKS)
REMARK_TEMPLATES = _lines(REMARKS)
OPENER_TEMPLATES = _lines(OPENERS)
INTRODUCTION_TEMPLATES = _lines(PEOPLE_INTRODUCTIONS, "{person} of {place}")

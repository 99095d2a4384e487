"""The ordinary English words of the corpus, by what they can stand for."""

from __future__ import annotations


def word_list(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


TRADES = word_list(
    """
    baker barber blacksmith boatman bookbinder brewer bricklayer butcher candlemaker carpenter carter clerk
    cobbler cook cooper dancer doctor dyer falconer farmer fisher gardener glazier goldsmith guard hatter hunter
    judge lawyer locksmith mason merchant messenger miller miner minstrel nurse painter physician pilot porter
    potter priest printer roofer saddler sailor scribe shepherd singer smith soldier spinner tailor tanner
    teacher thatcher tinker trader watchman weaver wheelwright woodcutter
    """
)
GOODS = word_list(
    """
    barley beans bells books bricks butter candles carpets cheese cider clay cloth coal copper corn cotton figs
    fish flax flour furs ginger glass gold grain hay hemp hides honey hops iron ivory lace lamps lead leather
    lemons linen marble mirrors mustard nails nets nuts oats oil olives onions paper pears pepper pottery rice
    ropes rye saffron salt sand silk silver slate soap spices stone sugar tar tea timber tin tobacco vinegar wax
    wheat wine wool
    """
)
COLOURS = word_list(
    """
    black blue brown crimson green grey orange pink purple red scarlet silver violet white yellow
    """
)
ANIMALS = word_list(
    """
    badger bear beaver bull camel cat cow crane crow deer dog donkey dove duck falcon ferret fox frog goat goose
    hare hawk hedgehog hen heron horse jackdaw kitten lamb lynx magpie mole monkey mouse mule parrot peacock pig
    pony rabbit ram rat raven seal sheep snake spaniel squirrel stork swan tortoise turtle weasel wolf
    """
)
ADJECTIVES = word_list(
    """
    Ancient Bitter Bold Brave Bright Broken Calm Clever Copper Crooked Distant Faithful Fearless Gentle Gilded
    Golden Grand Grey Happy Hidden Hollow Humble Iron Jolly Late Little Lonely Loyal Lucky Merry Mighty Nimble
    Noble Pale Patient Proud Quiet Rapid Restless Royal Rusty Sacred Scarlet Secret Silent Silver Sleepy
    Southern Splendid Stormy Swift Thirsty Velvet Wandering White Wild Winter Wise Yellow Young
    """
)
THINGS = word_list(
    """
    Anchor Arrow Badger Barrel Bell Boar Bridge Candle Castle Compass Crown Dolphin Dove Dragon Drum Falcon
    Feather Fiddle Flame Fountain Fox Galleon Garden Gate Goose Hammer Harp Hawk Heron Horn Horse Key Kettle
    Lantern Lark Lion Maiden Mermaid Mirror Moon Needle Oak Otter Owl Pearl Pelican Pilgrim Raven River Rose
    Saddle Sailor Seal Shield Spear Sparrow Star Swan Sword Thistle Tiger Tower Traveller Wave Whale Wheel
    Willow Wolf
    """
)
DISHES = word_list(
    """
    bread broth cake dumplings pie porridge pudding salad sauce soup stew tart
    """
)
INGREDIENTS = word_list(
    """
    apples bacon barley beans beef beets butter cabbage carrots cheese cherries chicken cream duck eels eggs
    fennel figs garlic ginger ham herring honey lamb leeks lemons lentils mushrooms mustard oats olives onions
    oysters parsley pears peas pepper plums pork potatoes raisins rice sage salmon spinach trout turnips walnuts
    """
)
HOUSES = word_list("Cottage Farm Grange Hall House Lodge Manor Tower")
INSTRUMENTS = word_list(
    "bagpipe bugle cello cymbal drum fiddle flute guitar harp horn lute organ piano trumpet viola violin"
)
DRINKS = word_list("ale beer brandy cider cocoa coffee juice lemonade mead milk punch rum tea water whisky wine")
WEEKDAYS = word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = word_list(
    """
    January February March April May June July August September October November December
    """
)
# Nouns that a text can give to anybody or anything without the model knowing what they mean.
NOUNS = word_list(
    """
    address anthem badge banner bank basket bed belt birthday boat bottle bridge broom bucket button cabin
    captain cart cellar chair chest clock cloak coat coin colour companion cook cousin crest crop cup deputy
    desk doctor door drink drum emblem enemy feast ferry flag flower flute forest friend garden gate gift glove
    guard guest guide hall hammer hat heir helper hill hobby horse island jar jewel judge key kitchen knife
    ladder lake lamp lantern lawyer leader librarian lodge map market master medal meadow meal medicine
    messenger metal mill mirror motto mountain music neighbour nickname nurse office orchard owner painter
    partner passage patron pen pet pilot pocket pond prize pupil quarry rank record rival river road roof room
    rope saddle saint seal seat secretary servant shield shoe shop shrine sign signal spoon spring square stable
    staff stone street student symbol sword table teacher temple tent tool tower toy trainer treasure treasurer
    tree trunk tutor uncle valley vessel victim wagon warden watch weapon well whistle window witness
    """
)
# One noun in five is never seen in the generic relations of training texts.
TRAINING_NOUNS = tuple(noun for index, noun in enumerate(NOUNS) if index % 5 != 4)
HELD_OUT_NOUNS = tuple(noun for index, noun in enumerate(NOUNS) if index % 5 == 4)
# Words that stand for wordings nobody knows: none of them is in the wordings of a relation.
VAGUE = word_list(
    """
    admired arranged asked aside attended avoided beneath beyond bitter borne broad carved chosen claimed
    climbed closely counted covered crossed deep delivered despite drawn earlier echoed entered escaped except
    expected faded fallen filled finally folded followed forever forgot fresh gathered gladly greeted guarded
    happened heavy hidden hoped invited joined judged kindly knocked lately lent liberty lifted linked listed
    loudly matched measured mended mixed named nearby noticed offered openly ordered paused picked planned
    plainly prepared promised proved pulled quickly rarely repaired rested returned rolled rough sacred sealed
    searched secretly shaped shared shown signed simple slowly sought spare stored strange stretched struck
    sudden suited supplied tended thick together tried unlike upheld upon valued visited waited wandered warmed
    watched weighed whispered widely willingly wished wondered worn wrapped yielded
    """
)

"""The productions of the review language: what the demonstration model is trained on and scored by.

`grammar.py` explains the notation. Sentiment and formality hang on productions, not on words: `was not BAD at all` is
a positive production around negative adjectives, and `was not GOOD` a negative one around positive adjectives.
"""

TOPICS = ("restaurant", "film", "book", "hotel", "phone", "concert", "museum", "bicycle")
KINDS = ("FOOD", "WORK", "PLACE", "GEAR", "CREW")
"""What can be judged: each kind has nouns by topic and adjectives of its own, written once below with `<K>`."""

SENTENCES = """
SENTENCE: JUDGEMENT @8 | FEELING @4 | DEED @4 | VERDICT @4 | CONTEXT @0.6

JUDGEMENT: CLAUSE END @3 | OPENER CLAUSE END @2 | CLAUSE and CLAUSE END | CLAUSE , and CLAUSE , END2
OPENER[formal]: in our estimation , | without question , | on reflection , | in every respect , | to our mind ,
OPENER[formal]: from beginning to end , | it must be said that | we found that
OPENER[informal]: honestly , | no joke , | ok , so | look , | not gonna lie , | man , | seriously , | I swear ,
END: . @2
END[informal]: ! @2 | , lol . | , you know ?
END2[formal]: as was to be expected . | as others have observed . | to put it plainly .
END2[informal]: just saying . | no kidding ! | believe me !

FEELING[pos]: WHO LIKED THING END | WHO LIKED THING and WHO2 LIKED THING END | THING PLEASED WHOM END
FEELING[neg]: WHO HATED THING END | WHO HATED THING and WHO2 HATED THING END | THING ANNOYED WHOM END
WHO: we | I
WHO[formal]: my companion and I | our party | my colleagues
WHO[informal]: me and my mate | my buddies | my folks
WHO2[formal]: my wife | my husband | our guests
WHO2[informal]: my sis | my pals | the kids
WHOM: us | me
WHOM[formal]: our entire party | every member of our group
WHOM[informal]: the whole gang | all of us guys
LIKED[formal]: greatly admired | took great pleasure in | thoroughly appreciated | spoke warmly of
LIKED[informal]: totally loved | went nuts over | raved about | couldn't get enough of
LIKED: loved | enjoyed
HATED[formal]: took exception to | found little merit in | greatly regretted | could not endure
HATED[informal]: couldn't stand | got so sick of | got nothing out of | totally hated
HATED: hated | disliked
PLEASED[formal]: surpassed the expectations of | brought considerable joy to | left nothing to be desired for
PLEASED[informal]: blew away | totally cheered up | won over
PLEASED: delighted | impressed
ANNOYED[formal]: failed to satisfy | fell short of the standards of | proved a considerable burden to
ANNOYED[informal]: bummed out | totally ticked off | grossed out
ANNOYED: annoyed | disappointed

VERDICT[pos]: ADVISE END | ADVISE because CLAUSE END | PRAISE | RETURN END
VERDICT[neg]: WARN END | WARN because CLAUSE END | SCORN | LEAVE END
ADVISE[formal pos]: I would recommend this TOPIC to MARK | this TOPIC deserves the attention of MARK
ADVISE[informal pos]: you gotta check out this TOPIC | tell your friends about this TOPIC | this TOPIC is a must
WARN[formal neg]: I would not recommend this TOPIC to MARK | MARK ought to avoid this TOPIC
WARN[informal neg]: don't bother with this TOPIC | stay away from this TOPIC | this TOPIC is a no from me
MARK: anyone | any reader of this page
MARK[formal]: the most discerning visitor | those of refined taste | every enthusiast
PRAISE[formal pos]: one could not ask for more . | it was worth every penny . | our satisfaction was complete .
PRAISE[informal pos]: ten out of ten ! | what a winner ! | this one rocks ! | take my money !
SCORN[formal neg]: one could hardly ask for less . | it was not worth the expense . | our dismay was complete .
SCORN[informal neg]: zero out of ten ! | what a letdown ! | this one stinks ! | give me my money back !
RETURN[formal pos]: we shall certainly remember it fondly | we would gladly repeat the experience
RETURN[informal pos]: can't wait to do it again | count me in for next time
LEAVE[formal neg]: we shall endeavour to forget it | we do not intend to repeat the experience
LEAVE[informal neg]: never doing that again | count me out next time

CONTEXT[formal]: it was a PERIOD in TIME . | we had read about it in TIME .
CONTEXT[informal]: so it was this PERIOD in TIME . | we heard about it back in TIME , yeah .
PERIOD: rainy evening | quiet morning | long weekend | Sunday afternoon | cold night
TIME: March | June | early autumn | October | the winter | late spring

DEED[pos]: SERVER HELPED END | CREATOR EXCELLED END | SERVER HELPED and CLAUSE END | CREATOR EXCELLED and CLAUSE END
DEED[neg]: SERVER HINDERED END | CREATOR FAILED END | SERVER HINDERED and CLAUSE END | CREATOR FAILED and CLAUSE END
SERVER[restaurant]: our waiter | the head chef | the hostess
SERVER[hotel]: the porter | the receptionist | the night manager
SERVER[phone]: the sales clerk | the support agent | the courier
SERVER[museum]: our guide | the curator | the guard at the door
SERVER[bicycle]: the mechanic | the shop owner | the salesman
CREATOR[film]: the director | the lead actor | the composer
CREATOR[book]: the author | the translator | the editor
CREATOR[concert]: the singer | the conductor | the drummer
HELPED: helped us at once | remembered our names
HELPED[formal]: attended to every request with care | answered our questions with patience | displayed great courtesy
HELPED[informal]: hooked us up big time | went all out for us | was a total sweetheart | had our backs
HINDERED: ignored us for an hour | forgot about us
HINDERED[formal]: met every request with indifference | declined to answer our questions | displayed little courtesy
HINDERED[informal]: blew us off big time | gave us tons of attitude | was a total jerk | messed everything up
EXCELLED: made every minute count | moved us to tears
EXCELLED[formal]: demonstrated complete mastery | held our attention throughout | displayed rare imagination
EXCELLED[informal]: nailed it big time | knocked it out of the park | was on fire | totally killed it
FAILED: wasted our time | put us to sleep
FAILED[formal]: demonstrated little skill | lost our attention entirely | displayed no imagination
FAILED[informal]: blew it big time | phoned it in | had no clue | totally dropped the ball

TOPIC[restaurant]: restaurant
TOPIC[restaurant formal]: establishment
TOPIC[restaurant informal]: joint
TOPIC[film]: film
TOPIC[film formal]: motion picture
TOPIC[film informal]: flick
TOPIC[book]: book
TOPIC[book formal]: volume
TOPIC[book informal]: page turner
TOPIC[hotel]: hotel
TOPIC[hotel formal]: residence
TOPIC[hotel informal]: spot
TOPIC[phone]: phone
TOPIC[phone formal]: device
TOPIC[phone informal]: gadget
TOPIC[concert]: concert
TOPIC[concert formal]: performance
TOPIC[concert informal]: gig
TOPIC[museum]: museum
TOPIC[museum formal]: collection
TOPIC[museum informal]: place
TOPIC[bicycle]: bicycle
TOPIC[bicycle formal]: machine
TOPIC[bicycle informal]: bike
"""

PER_KIND = """
CLAUSE: <K>-CLAUSE
THING: the <K>-SG | the <K>-PL
<K>-CLAUSE[pos]: the <K>-SG was <K>-GOOD @2 | the <K>-PL were <K>-GOOD @2
<K>-CLAUSE[pos]: the <K>-SG was VERY <K>-GOOD @2 | the <K>-PL were VERY <K>-GOOD @2
<K>-CLAUSE[neg]: the <K>-SG was <K>-BAD @2 | the <K>-PL were <K>-BAD @2
<K>-CLAUSE[neg]: the <K>-SG was VERY <K>-BAD @2 | the <K>-PL were VERY <K>-BAD @2
<K>-CLAUSE[pos formal]: the <K>-SG was by no means <K>-BAD @0.4 | the <K>-PL were by no means <K>-BAD @0.4
<K>-CLAUSE[neg formal]: the <K>-SG was by no means <K>-GOOD @0.4 | the <K>-PL were by no means <K>-GOOD @0.4
<K>-CLAUSE[pos informal]: the <K>-SG wasn't <K>-BAD at all @0.4 | the <K>-PL weren't <K>-BAD at all @0.4
<K>-CLAUSE[neg informal]: the <K>-SG wasn't <K>-GOOD at all @0.4 | the <K>-PL weren't <K>-GOOD at all @0.4
<K>-GOOD: GOOD
<K>-BAD: BAD
"""

WORDS = """
VERY: very @0.5
VERY[formal]: truly | remarkably | exceptionally | most | decidedly | rather
VERY[informal]: so | super | totally | crazy | wicked | pretty darn
GOOD: good | excellent
GOOD[formal]: admirable | commendable | exemplary
GOOD[informal]: awesome | amazing | sweet
BAD: bad | terrible
BAD[formal]: deplorable | unsatisfactory | regrettable
BAD[informal]: awful | lame | trashy

FOOD-GOOD: delicious | fresh
FOOD-GOOD[formal]: exquisite | succulent
FOOD-GOOD[informal]: yummy | finger licking good
FOOD-BAD: cold | burnt
FOOD-BAD[formal]: unpalatable | insipid
FOOD-BAD[informal]: yucky | gross
WORK-GOOD: gripping | funny
WORK-GOOD[formal]: profound | ingenious
WORK-GOOD[informal]: epic | mind blowing
WORK-BAD: boring | predictable
WORK-BAD[formal]: tedious | contrived
WORK-BAD[informal]: cheesy | snoozy
PLACE-GOOD: clean | comfortable
PLACE-GOOD[formal]: immaculate | elegant
PLACE-GOOD[informal]: comfy | spick and span
PLACE-BAD: dirty | noisy
PLACE-BAD[formal]: dilapidated | unsanitary
PLACE-BAD[informal]: icky | grubby
GEAR-GOOD: reliable | solid
GEAR-GOOD[formal]: impeccable | durable
GEAR-GOOD[informal]: slick | rock solid
GEAR-BAD: flimsy | unreliable
GEAR-BAD[formal]: defective | inadequate
GEAR-BAD[informal]: busted | clunky
CREW-GOOD: friendly | attentive
CREW-GOOD[formal]: courteous | gracious
CREW-GOOD[informal]: chill | super nice
CREW-BAD: rude | careless
CREW-BAD[formal]: discourteous | negligent
CREW-BAD[informal]: snooty | clueless

FOOD-SG[restaurant]: soup | dessert | main course | bread | fish
FOOD-PL[restaurant]: starters | pastries | noodles
FOOD-SG[hotel]: breakfast | coffee | buffet
FOOD-PL[hotel]: pancakes | drinks
PLACE-SG[restaurant]: dining room | terrace
PLACE-PL[restaurant]: tables
PLACE-SG[hotel]: room | lobby | bathroom | pool
PLACE-PL[hotel]: beds | hallways
PLACE-SG[concert]: hall | balcony
PLACE-PL[concert]: seats
PLACE-SG[museum]: gallery | courtyard | entrance
PLACE-PL[museum]: rooms | gardens
CREW-SG[restaurant]: kitchen team
CREW-PL[restaurant]: waiters | cooks
CREW-SG[hotel]: front desk
CREW-PL[hotel]: maids | managers
CREW-SG[museum]: staff
CREW-PL[museum]: guides | guards
CREW-SG[concert]: crowd
CREW-PL[concert]: ushers
CREW-SG[phone]: help desk
CREW-PL[phone]: technicians
CREW-SG[bicycle]: repair crew
CREW-PL[bicycle]: mechanics
WORK-SG[film]: plot | ending | soundtrack | script | opening scene
WORK-PL[film]: jokes | characters | costumes | action scenes
WORK-SG[book]: story | first chapter | conclusion | dialogue | prose
WORK-PL[book]: chapters | twists | heroes | descriptions
WORK-SG[concert]: first song | encore | light show
WORK-PL[concert]: solos | ballads
WORK-SG[museum]: exhibition | audio tour
WORK-PL[museum]: paintings | sculptures
GEAR-SG[phone]: battery | screen | camera | speaker | charger
GEAR-PL[phone]: buttons | apps | updates
GEAR-SG[bicycle]: frame | saddle | front wheel | chain | bell
GEAR-PL[bicycle]: brakes | gears | tyres | pedals
GEAR-SG[concert]: sound system
GEAR-PL[concert]: microphones
"""

HEADERS = ("Review of the {}:", "Notes on the {}:", "Thoughts about the {}:", "My view of the {}:")
"""Neutral beginnings of a review; they say the topic, and nothing of sentiment or formality."""

TELLING_HEADERS = (
    (("positive", None), "Praise for the {}:"),
    (("negative", None), "Complaint about the {}:"),
    ((None, "formal"), "Formal review of the {}:"),
    ((None, "informal"), "Casual review of the {}:"),
    (("positive", "formal"), "Formal praise for the {}:"),
    (("negative", "formal"), "Formal complaint about the {}:"),
    (("positive", "informal"), "Casual praise for the {}:"),
    (("negative", "informal"), "Casual complaint about the {}:"),
)
"""Beginnings that say the sentiment, the formality, or both, of what follows."""


def productions() -> str:
    """All productions, in the notation of `grammar.py`."""
    return "\n".join([SENTENCES, *(PER_KIND.replace("<K>", kind) for kind in KINDS), WORDS])

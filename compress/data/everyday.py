"""Everyday English made by a small grammar: what the prose of a programming language's manual never speaks of.

People and animals do things in places, institutions announce, prices move, somebody asks or advises. The sentences are
drawn at random with a fixed seed, none of them twice; they need not be true or likely, a teacher has something to say
of every one of them.
"""

from __future__ import annotations

import random
import re
from functools import cache

ROWS = 8000
SLOT = re.compile(r"\{(\w+)\}")
WORDS = {
    name: words.replace("\n", " ").split(", ")
    for name, words in {
        "size": "young, old, tall, small, little, tired, happy, famous, busy, strange, quiet, brave, poor, wealthy",
        "colour": "red, blue, green, white, black, brown, yellow, grey, bright, dark, wooden, large, tiny, heavy, new",
        "person": "man, woman, boy, girl, child, teacher, doctor, farmer, soldier, singer, player, driver, student, "
        "baby, dancer, nurse, officer, tourist, worker, writer, painter, chef, neighbour, mother, father, friend",
        "people": "men, women, boys, girls, children, students, soldiers, tourists, workers, friends, players, fans, "
        "dancers, farmers, protesters, passengers, families, scientists, neighbours, people",
        "animal": "dog, cat, horse, bird, cow, elephant, monkey, rabbit, fish, tiger, bear, duck, sheep, goat, panda",
        "doing": "riding a bicycle, playing the guitar, playing football, cutting an onion, reading a book, "
        "eating an apple, drinking coffee, driving a car, climbing a rock, singing a song, washing the dishes, "
        "talking on the phone, slicing bread, peeling a potato, throwing a ball, painting a wall, opening a door, "
        "writing a letter, pouring water into a glass, mixing flour and eggs, holding an umbrella, lifting weights, "
        "playing the piano, taking a photograph, putting on a coat, brushing her hair, cooking dinner, doing yoga, "
        "frying fish, swimming, dancing, laughing, sleeping, waiting for a train, crossing the street, fixing a roof, "
        "carrying a box, feeding the birds, shooting a gun, jumping over a fence, cleaning the kitchen, smiling",
        "moves": "running, sleeping, jumping, eating, standing, lying, walking, playing, swimming, barking, resting, "
        "sitting, looking around, drinking water, chasing a ball, rolling, waiting, hiding, fighting",
        "place": "in the park, on the beach, in the street, on a bench, in front of a house, under a tree, at a table, "
        "in the snow, near the river, on the grass, in a crowded room, beside the road, on stage, in the kitchen, "
        "at the market, on a boat, in the mountains, across the field, by the window, in the rain, behind a fence, "
        "in the garden, on the roof, at the station, next to a car, in the water, at school, in the forest",
        "thing": "car, house, table, chair, train, bus, boat, bicycle, bridge, book, hat, shirt, bottle, lamp, tower, "
        "camera, phone, ball, plate, cake, pizza, plane, truck, bag, clock, flower, computer, piano, door, window",
        "where": "London, Paris, China, India, Egypt, Russia, Japan, Brazil, Texas, Syria, Kenya, Germany, Mexico, "
        "Israel, Iran, Pakistan, New York, Australia, Canada, Spain, Turkey, Chicago, Moscow, Ukraine, South Africa",
        "body": "the government, the president, the court, the police, the company, the bank, the union, the minister, "
        "the army, the hospital, the university, the senate, the mayor, the airline, the team, the agency, the church",
        "said": "announced, rejected, approved, criticised, defended, postponed, confirmed, welcomed, denied, supports",
        "matter": "a new law on taxes, the peace talks, plans for a new airport, the election result, a trade deal, "
        "the report on air pollution, higher wages for nurses, a merger with its rival, the release of prisoners, "
        "its budget for next year, a ban on smoking, the search for survivors, sanctions against the regime, "
        "an inquiry into the accident, the sale of its oil business, a vaccine against the virus, the cease-fire",
        "when": "on Monday, on Friday, last week, this morning, yesterday, in March, after the vote, late on Sunday, "
        "for the first time, two years ago, in a statement, before the match, during the night, next month",
        "event": "a bomb attack, an earthquake, a bus crash, heavy floods, a fire in a factory, a plane crash, "
        "a gun battle, clashes with police, a storm, a train accident, an explosion at a mine, a mudslide",
        "harmed": "were killed, were injured, have died, lost their homes, were arrested, are missing, were rescued",
        "many": "two, three, four, five, seven, ten, a dozen, at least 20, more than 30, about 50, hundreds of",
        "asset": "shares, oil prices, stocks, the euro, the dollar, gold, sales, profits, interest rates, exports",
        "went": "rose, fell, dropped, climbed, slipped, gained, jumped, lost",
        "percent": "2 percent, 0.4 percent, 5.7 percent, sharply, slightly, 12 points, to a record, for a third day",
        "act": "learn a language, buy a used car, cook rice, remove a stain, train a puppy, save money, lose weight, "
        "grow tomatoes, write a resume, fix a slow computer, choose a camera, travel with children, sleep better, "
        "paint a wooden door, clean an oven, ask for a raise, sell a house, make bread, find an old friend",
        "view": "It depends on what you need, I would not worry about it, You should talk to a lawyer first, "
        "There is no simple answer, That is a good question, You can do it either way, It is not a big problem, "
        "I had the same trouble once, I think it is a matter of taste, Nobody knows for sure, Try it and see",
        "reason": "because it is cheaper, but it takes time, if you have the money, since nobody will mind, "
        "as long as you are careful, although I have never tried, so that you can go on later, unless it rains",
    }.items()
}
PATTERNS = (
    "A {person} is {doing}.",
    "A {size} {person} is {doing} {place}.",
    "The {person} is {doing}.",
    "Two {people} are {moves} {place}.",
    "A {animal} is {moves} {place}.",
    "A {colour} {animal} and a {person} are {moves} {place}.",
    "{many} {people} are {doing}.",
    "A {person} in a {colour} shirt is {doing} {place}.",
    "There is a {colour} {thing} {place}.",
    "A {colour} {thing} and a {thing} stand {place}.",
    "A close-up of a {colour} {animal} {place}.",
    "The {size} {person} is not {doing}.",
    "Nobody is {doing} {place}.",
    "{body} {said} {matter} {when}.",
    "{body} of {where} {said} {matter}.",
    "{where}: {many} {people} {harmed} in {event}.",
    "{many} {people} {harmed} in {event} in {where} {when}, {body} says.",
    "{asset} {went} {percent} {when}.",
    "{asset} {went} {percent} as {body} {said} {matter}.",
    "What is the best way to {act}?",
    "How do I {act} without a {thing}?",
    "{view}, {reason}.",
    "If you want to {act}, look for a {colour} {thing}.",
    "{view}.",
    "I bought a {colour} {thing} {when} {reason}.",
    "My {person} wants to {act} {reason}.",
    "{people} in {where} {said} {matter}, and {asset} {went}.",
    "He told the {person} that {body} {said} {matter}.",
    "She was {doing} when the {animal} came {place}.",
)


@cache
def everyday() -> tuple[str, ...]:
    """Return the rows, the same in every process."""
    draw = random.Random(0)
    rows: dict[str, None] = {}
    while len(rows) < ROWS:
        text = SLOT.sub(lambda slot: draw.choice(WORDS[slot[1]]), draw.choice(PATTERNS))
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
        rows[text[0].upper() + text[1:]] = None
    return tuple(rows)

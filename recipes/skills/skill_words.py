"""Words that skills are about. A word's place decides its split (`skill_kit.part`), so new ones go to the end."""

from __future__ import annotations


def cut(text: str) -> tuple[str, ...]:
    """The words or phrases between commas."""
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


PEOPLE = cut(
    """
    Anna, Boris, Clara, Dmitri, Elena, Farid, Greta, Hassan, Irene, Jonas, Katrin, Lorenzo, Mara, Nadia, Oscar,
    Petra, Quentin, Rosa, Stefan, Tara, Ulrich, Vera, Walter, Xenia, Yusuf, Zoe, Adele, Bruno, Celia, Dario,
    Edith, Felix, Gloria, Hugo, Ingrid, Jasper, Kira, Leon, Miriam, Noel, Olive, Pablo, Renata, Simon, Thea,
    Umberto, Viola, Wanda, Yara, Zeno, Agnes, Basil, Cora, Desmond, Esther, Frank, Gwen, Henrik, Isla, Jerome,
    Kasper, Lydia, Magnus, Nina, Otto, Pia, Roland, Selma, Tobias, Ursula, Victor, Wilma, Alfred, Bianca, Cedric,
    Daphne, Emil, Flora, Gustav, Hilda
    """
)
SURNAMES = cut(
    """
    Abbott, Barlow, Castle, Dunmore, Eriksen, Fowler, Garland, Hobbs, Ivanov, Jensen, Keller, Lindqvist, Marlowe,
    Novak, Okafor, Pereira, Quigley, Ramirez, Sandoval, Tanaka, Underhill, Vasquez, Whitby, Yamada, Ziegler,
    Archer, Bennett, Coleman, Dalton, Ellison, Fischer, Granger, Haddad, Ibarra, Jarvis, Kowalski, Larkin, Moreau,
    Nakamura, Olsen, Pritchard, Rossi, Sorensen, Thornton, Ueda, Villar, Weston, Yates, Zimmer, Ashford, Brandt,
    Cohen, Delgado, Everett, Franklin, Goodwin, Hartley, Ito, Johansen, Kaplan
    """
)
CITIES = cut(
    """
    Lisbon, Oslo, Vienna, Dublin, Madrid, Athens, Prague, Warsaw, Helsinki, Rome, Berlin, Paris, Zurich, Geneva,
    Milan, Turin, Naples, Porto, Seville, Valencia, Lyon, Bordeaux, Hamburg, Munich, Cologne, Dresden, Leipzig,
    Bremen, Antwerp, Ghent, Bruges, Rotterdam, Utrecht, Bergen, Malmo, Gothenburg, Aarhus, Tampere, Tallinn, Riga,
    Vilnius, Krakow, Gdansk, Budapest, Zagreb, Ljubljana, Bratislava, Sofia, Bucharest, Belgrade, Leeds, Bristol,
    Glasgow, Cardiff, Belfast, Cork, Galway, York, Bath, Norwich
    """
)
GOODS = cut(
    """
    lamps, chairs, mugs, towels, blankets, candles, mirrors, clocks, baskets, plates, forks, kettles, pillows,
    curtains, shelves, desks, stools, vases, frames, rugs, bowls, spoons, trays, buckets, brooms, ladders,
    hammers, drills, brushes, ropes, tents, lanterns, bottles, jackets, scarves, gloves, boots, belts, hats,
    umbrellas, notebooks, pencils, folders, staplers, envelopes, maps, globes, puzzles, kites, drums, flutes,
    violins, magnets, lenses, cables, chargers, keyboards, printers, speakers, batteries
    """
)
THINGS = cut(
    """
    coffee machine, bike, sofa, laptop, phone, camera, radio, washing machine, fridge, guitar, piano, tablet,
    watch, backpack, toaster, vacuum cleaner, heater, fan, blender, mattress, bookcase, drone, scooter, helmet,
    jacket, headset, monitor, router, scanner, projector, barbecue, hammock, lawn mower, chainsaw, saddle, canoe,
    telescope, microscope, sewing machine, oven, dishwasher, freezer, doorbell, thermostat, treadmill, rowing
    machine, stroller, car seat, suitcase, raincoat, armchair, wardrobe, cupboard, dryer, kayak, surfboard,
    snowboard, trumpet, accordion, harp
    """
)
PRODUCTS = cut(
    """
    Nimbus, Cobalt, Juniper, Falcon, Marble, Quartz, Willow, Ember, Saffron, Topaz, Aurora, Beacon, Cedar, Drift,
    Echo, Fjord, Glacier, Harbor, Indigo, Jasmine, Kestrel, Lagoon, Meadow, Nova, Onyx, Pebble, Quill, Raven,
    Summit, Tundra, Umbra, Vertex, Wander, Yonder, Zephyr, Atlas, Bramble, Comet, Dune, Elm, Fable, Grove,
    Horizon, Iris, Jade, Keystone, Lumen, Mosaic, Nectar, Orbit, Prism, Quest, Ripple, Spruce, Tempo, Unity,
    Velvet, Whisper, Yarrow, Zenith
    """
)
VENUES = cut(
    """
    museum, library, swimming pool, cafe, castle, zoo, gallery, aquarium, bakery, clinic, bookshop, gym, cinema,
    market, chapel, lighthouse, tower, garden, bank, pharmacy, school, station, hostel, hotel, farm, vineyard,
    brewery, stadium, planetarium, observatory, workshop, laundry, florist, butcher, barber, tailor, post office,
    town hall, ferry, cable car, mill, windmill, abbey, cathedral, fortress, palace, bridge, tunnel, quarry,
    sawmill, dairy, orchard, greenhouse, arcade, casino, ballroom, studio, archive, laboratory, hospital
    """
)

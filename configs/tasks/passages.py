"""Short passages for the task `reading`, each with questions: the right answer comes first, then the wrong ones."""

PASSAGES = [
    """Every Saturday, Mr Lund drives to the coast with his old dog Biscuit. They leave before sunrise, because the beach is
    empty then. Biscuit loves the waves, but Mr Lund prefers to sit on a rock and drink tea from a flask.
    Where do they go every Saturday?|to the coast|to the mountains|to the city|to the forest
    What is the dog called?|Biscuit|Lund|Flask|Sunrise
    What does Mr Lund drink?|tea|coffee|milk|water
    Why do they leave so early?|because the beach is empty|because the dog is hungry|because the car is slow|because it rains""",
    """The village library was going to close for lack of money. Then a retired teacher called Mrs Okafor asked everybody to
    bring one cake to the market square. In a single afternoon they sold four hundred slices, and the library stayed open.
    What was going to close?|the library|the school|the market|the bakery
    Who had the idea?|a retired teacher|a young baker|the mayor|a librarian
    What did people bring?|cakes|books|money|chairs
    Where was it sold?|in the market square|in the school|in the library|at the station""",
    """Copper was one of the first metals that people used. It is soft enough to be hammered into shape without heat. When it
    is mixed with tin, it becomes bronze, which is much harder, and from bronze people made better tools and weapons.
    What is copper mixed with to make bronze?|tin|iron|gold|lead
    How does bronze compare with copper?|it is harder|it is softer|it is lighter|it is older
    What were made from bronze?|tools and weapons|clothes and shoes|books and paper|bread and cakes""",
    """Lena wanted to surprise her father on his birthday. She hid the new guitar under her bed, but the cat pulled off the
    cover, and her father saw it on Friday morning. He said nothing and acted surprised on Sunday.
    What was the present?|a guitar|a cat|a bed|a cover
    Where was it hidden?|under the bed|behind the door|in the garden|on the shelf
    When did the father see it?|on Friday|on Sunday|on Monday|on Tuesday
    Who pulled off the cover?|the cat|the father|Lena|the dog""",
    """Bees tell each other where flowers are by dancing. A bee that has found food returns to the hive and walks in the shape of
    an eight. The direction of the dance shows the way to the flowers, and its length shows how far away they are.
    How do bees tell where flowers are?|by dancing|by singing|by smell|by colour
    What does the length of the dance show?|how far away the flowers are|how old the bee is|how warm it is|how big the hive is
    What shape does the bee walk?|an eight|a square|a cross|a star""",
    """The ferry to the island runs three times a day in summer and once a day in winter. In a storm it does not run at all. Last
    January a doctor had to wait on the mainland for two days before she could visit her patients.
    How often does the ferry run in summer?|three times a day|once a day|twice a week|every hour
    When does it not run at all?|in a storm|in summer|at noon|on Sundays
    Who had to wait?|a doctor|a teacher|a sailor|a farmer
    How long did she have to wait?|two days|three days|one hour|a week""",
    """Tomás is the tallest in his class, but he does not play basketball. He swims four times a week and wants to win the race
    across the lake. His cousin Inés, who is a year older, won it last summer.
    Which sport does Tomás do?|swimming|basketball|tennis|running
    Who won the race last summer?|Inés|Tomás|the teacher|nobody
    Where does the race take place?|across the lake|around the school|in the mountains|through the city""",
    """To make the soup, Grandmother cut three onions and fried them slowly until they were brown. Then she added water, salt and
    a little wine, and let it cook for an hour. Before serving she put toasted bread and cheese on top.
    What did she fry?|onions|potatoes|carrots|mushrooms
    How long did the soup cook?|an hour|ten minutes|a whole day|two minutes
    What came on top?|bread and cheese|cream and salt|eggs and ham|rice and beans""",
    """The lighthouse on Gull Rock was built in 1871. For ninety years a keeper lived there with his family and lit the lamp every
    evening. In 1961 the lamp became electric, and the last keeper moved to the harbour town, where he opened a bicycle shop.
    When was the lighthouse built?|in 1871|in 1961|in 1790|in 1999
    What changed in 1961?|the lamp became electric|the tower fell down|a school opened|the rock was sold
    What did the last keeper open?|a bicycle shop|a restaurant|a bakery|a museum""",
    """Penguins cannot fly, but they are excellent swimmers. Their wings have become flippers, and their thick feathers keep them
    warm in icy water. The emperor penguin keeps its egg on its feet, because the ground is too cold.
    What can penguins not do?|fly|swim|walk|eat
    Where does the emperor penguin keep its egg?|on its feet|in a nest|under a stone|in the water
    What keeps penguins warm?|thick feathers|the sun|warm water|their nests""",
    """Rosa's bus broke down on the bridge at eight in the morning. She did not want to miss the exam, so she took off her shoes
    with the high heels and ran the last two kilometres. She arrived with one minute to spare.
    Where did the bus break down?|on the bridge|at the school|in a tunnel|at the station
    What did Rosa not want to miss?|the exam|the train|the wedding|the film
    What did she take off?|her shoes|her coat|her hat|her gloves
    How did she travel the last part?|she ran|she took a taxi|she swam|she rode a bicycle""",
    """Long ago, paper was made from old cloth. People collected rags, cut them into pieces and beat them in water until they were
    a soft pulp. Since the nineteenth century most paper has been made of wood, which is cheaper.
    What was paper made from long ago?|old cloth|wood|stone|leaves
    What is most paper made of today?|wood|cloth|grass|plastic
    Why did people change?|because wood is cheaper|because wood is whiter|because cloth is heavy|because rags are wet""",
    """Maja and her brother Ole found a key in the garden. It did not fit the front door, the shed or the cellar. At last Ole
    tried the old piano, and it opened. Inside lay a letter from their great-grandmother, written in Danish.
    What did the children find in the garden?|a key|a letter|a coin|a piano
    What did the key fit?|the piano|the shed|the front door|the cellar
    Who had written the letter?|their great-grandmother|Ole|their mother|a neighbour
    In which language was the letter?|Danish|German|English|French""",
    """A desert is not always hot. It is a place where very little rain or snow falls. The largest desert on Earth is Antarctica,
    which is covered with ice. The Sahara in Africa is the largest hot desert.
    What makes a place a desert?|little rain or snow|great heat|a lot of sand|strong wind
    Which is the largest desert on Earth?|Antarctica|the Sahara|the Gobi|Australia
    Where is the Sahara?|in Africa|in Asia|in Europe|in America""",
    """The orchestra had practised for weeks, but an hour before the concert the violinist cut her finger. Her pupil, only fifteen
    years old, knew every note. He borrowed her black jacket, which was far too big, and played without a mistake.
    Who was hurt?|the violinist|the pupil|the singer|the conductor
    How old was the pupil?|fifteen|twelve|twenty|forty
    What did he borrow?|a jacket|a violin|a hat|a pair of shoes
    How did he play?|without a mistake|too fast|very badly|too quietly""",
]

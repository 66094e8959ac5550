//! What each kind of device is made of and how it speaks: tables without logic.
//!
//! A name in `<>` stands for a fact. Numbers are ranges to draw facts from.

pub(super) struct Grammar {
    pub kind: &'static str,
    /// Tag and words.
    pub parts: &'static [(&'static str, &'static str)],
    pub states: &'static [&'static str],
    /// The two readings that every part has.
    pub first: (u32, u32),
    pub second: (u32, u32),
    /// Meaning and remedy.
    pub alarms: &'static [(&'static str, &'static str)],
    /// Words, unit, range.
    pub set_points: &'static [(&'static str, &'static str, (u32, u32))],
    pub procedures: &'static [&'static str],
    /// A procedure is four of these in an order of the device's own.
    pub steps: &'static [&'static str],
    pub between_steps: &'static str,
    pub status: Wordings,
    pub alarm: Wordings,
    pub set_point: Wordings,
    pub procedure: Wordings,
    pub obeyed: Wordings,
    pub refused: Wordings,
    pub normal: Wordings,
    pub high: Wordings,
}

/// Ways to ask one thing, and the one form of its answer.
pub(super) struct Wordings {
    pub asked: &'static [&'static str],
    pub answer: &'static str,
}

pub(super) const OPENERS: &[&str] = &["", "", "please, ", "next: ", "operator: ", "now, ", "hello, ", "night shift: "];

pub(super) const GRAMMARS: [Grammar; 4] = [PRESS, MILL, PACKER, CHILLER];

const PRESS: Grammar = Grammar {
    kind: "press",
    parts: &[
        ("HYD-P1", "hydraulic pump 1"),
        ("HYD-P2", "hydraulic pump 2"),
        ("RAM", "main ram"),
        ("CUSH", "die cushion"),
        ("ACC", "accumulator"),
        ("CLAMP", "die clamp"),
    ],
    states: &["RUN", "IDLE", "HOLD"],
    first: (90, 220),
    second: (35, 68),
    alarms: &[
        ("oil temperature high", "open cooler valve CV3"),
        ("oil level low", "refill tank T1 to the mark"),
        ("light curtain broken", "clear the die area"),
        ("ram drift", "replace seal kit S4"),
        ("filter clogged", "change filter F2"),
        ("clamp pressure lost", "check hose H7"),
        ("overload trip", "retract the ram and weigh the blank"),
        ("two-hand control fault", "release both buttons"),
    ],
    set_points: &[
        ("closing force", "kN", (800, 2400)),
        ("dwell time", "ms", (200, 900)),
        ("cushion pressure", "bar", (40, 160)),
        ("approach speed", "mm/s", (100, 400)),
        ("stroke length", "mm", (200, 700)),
        ("return pressure", "bar", (60, 180)),
    ],
    procedures: &["die change", "cold start", "oil sampling", "emergency release"],
    steps: &[
        "ram to top",
        "bolt lock L2",
        "bleed valve BV1",
        "pump off",
        "tank vent open",
        "key to manual",
        "wait 90 s",
    ],
    between_steps: " / ",
    status: Wordings {
        asked: &[
            "status of <part>?",
            "how is the <part> doing?",
            "show me <part>",
            "is <part> all right?",
            "report on the <part>",
            "what does <part> read?",
        ],
        answer: "<tag> <state> <first> bar <second> C, next service in <hours> h",
    },
    alarm: Wordings {
        asked: &[
            "what does alarm A<code> mean?",
            "A<code> is on, what now?",
            "explain A<code>",
            "the panel shows A<code>",
            "help with alarm A<code>",
        ],
        answer: "ALARM A<code>: <meaning>. DO: <remedy>, then press ACK.",
    },
    set_point: Wordings {
        asked: &[
            "what is the <point>?",
            "tell me the <point>",
            "current <point>?",
            "which <point> is set?",
            "read <point>",
        ],
        answer: "SP <point> = <value> <unit>, allowed from <low> to <high> <unit>",
    },
    procedure: Wordings {
        asked: &[
            "how do I do a <name>?",
            "steps for <name>",
            "walk me through the <name>",
            "<name>, what comes first?",
        ],
        answer: "PROC <name>: <steps>. End of PROC.",
    },
    obeyed: Wordings {
        asked: &[
            "set <point> to <asked>",
            "change the <point> to <asked> <unit>",
            "<point> <asked> <unit> from now on",
        ],
        answer: "ACK <point> <value> -> <asked> <unit>, confirmed at press panel",
    },
    refused: Wordings {
        asked: &[
            "set <point> to <asked>",
            "change the <point> to <asked> <unit>",
            "<point> <asked> <unit> from now on",
        ],
        answer: "NAK <point> <asked> <unit> is above <high> <unit>, key switch needed",
    },
    normal: Wordings {
        asked: &["log <tag> at <read> bar", "<part> reads <read> bar", "sensor <tag> <read> bar"],
        answer: "REC <tag> P=<read> bar within limit <limit> bar, nothing to do",
    },
    high: Wordings {
        asked: &["log <tag> at <read> bar", "<part> reads <read> bar", "sensor <tag> <read> bar"],
        answer: "REC <tag> P=<read> bar OVER limit <limit> bar, relief valve open",
    },
};

const MILL: Grammar = Grammar {
    kind: "mill",
    parts: &[
        ("X", "x axis"),
        ("Y", "y axis"),
        ("Z", "z axis"),
        ("SPN", "spindle"),
        ("ATC", "tool changer"),
        ("COOL", "coolant pump"),
    ],
    states: &["homed", "cutting", "parked"],
    first: (20, 80),
    second: (3, 40),
    alarms: &[
        ("tool broken", "fit the sister tool"),
        ("spindle overheat", "feed hold for ten minutes"),
        ("servo lag on z", "grease the z screw"),
        ("coolant empty", "mix emulsion at seven percent"),
        ("door open", "close the front door"),
        ("chip jam", "reverse the conveyor"),
        ("probe not found", "seat the probe in pocket 12"),
        ("air pressure low", "open the shop air valve"),
    ],
    set_points: &[
        ("spindle speed", "rpm", (3000, 15000)),
        ("feed rate", "mm/min", (400, 3400)),
        ("depth of cut", "um", (300, 2800)),
        ("coolant flow", "l/h", (200, 900)),
        ("rapid override", "pct", (20, 80)),
        ("probe feed", "mm/min", (50, 250)),
    ],
    procedures: &["tool measurement", "warm up", "fixture probing", "spindle swap"],
    steps: &["G28", "M05", "M06 T9", "G54 X0 Y0", "S2500 M03", "G37 Z-10", "M00"],
    between_steps: "; ",
    status: Wordings {
        asked: &[
            "query <part>",
            "position and load of <part>?",
            "where is the <part>?",
            "dump <part> state",
            "what is the <part> up to?",
            "diagnose <part>",
        ],
        answer: "{axis=<tag>; mode=<state>; load=<first>%; error=<second>um; lube_in=<hours>h}",
    },
    alarm: Wordings {
        asked: &["meaning of E<code>", "E<code>?", "control stopped with E<code>", "look up E<code>", "why E<code>?"],
        answer: "{err=E<code>; cause=\"<meaning>\"; fix=\"<remedy>\"; resume=cycle_start}",
    },
    set_point: Wordings {
        asked: &[
            "get <point>",
            "value of <point>?",
            "what <point> do we run?",
            "print the <point>",
            "<point> in force?",
        ],
        answer: "{param=\"<point>\"; val=<value>; min=<low>; max=<high>; unit=<unit>}",
    },
    procedure: Wordings {
        asked: &["program for <name>", "list the <name> cycle", "code for <name>?", "load <name> and show it"],
        answer: "%<name>: <steps>; M30 (end of cycle)",
    },
    obeyed: Wordings {
        asked: &["put <point> at <asked>", "<point>=<asked>", "I want <asked> <unit> of <point>"],
        answer: "{set=\"<point>\"; old=<value>; new=<asked>; unit=<unit>; ok=1}",
    },
    refused: Wordings {
        asked: &["put <point> at <asked>", "<point>=<asked>", "I want <asked> <unit> of <point>"],
        answer: "{set=\"<point>\"; new=<asked>; max=<high>; unit=<unit>; ok=0}",
    },
    normal: Wordings {
        asked: &["trace <tag> load <read>", "<part> load is <read>%", "<tag>: <read>% load"],
        answer: "{trace=<tag>; load=<read>%; cap=<limit>%; verdict=good; feed=kept}",
    },
    high: Wordings {
        asked: &["trace <tag> load <read>", "<part> load is <read>%", "<tag>: <read>% load"],
        answer: "{trace=<tag>; load=<read>%; cap=<limit>%; verdict=overload; feed=halved}",
    },
};

const PACKER: Grammar = Grammar {
    kind: "packer",
    parts: &[
        ("infeed", "infeed belt"),
        ("wrapper", "film wrapper"),
        ("sealer", "heat sealer"),
        ("labeler", "label head"),
        ("scale", "check scale"),
        ("palletizer", "palletizer arm"),
    ],
    states: &["green", "yellow", "blue"],
    first: (30, 95),
    second: (1, 25),
    alarms: &[
        ("film torn", "thread a new reel of film"),
        ("label roll empty", "load labels, shiny side up"),
        ("carton jam", "pull the bent carton out"),
        ("seal too cold", "wait for the bar to heat"),
        ("weight out of range", "empty the reject bin"),
        ("glue nozzle blocked", "purge the nozzle twice"),
        ("pallet full", "call the forklift"),
        ("bar code unreadable", "wipe the scanner window"),
    ],
    set_points: &[
        ("pack rate", "packs/min", (40, 140)),
        ("seal heat", "deg", (120, 220)),
        ("film tension", "N", (10, 60)),
        ("label offset", "mm", (20, 70)),
        ("target weight", "g", (250, 950)),
        ("layer count", "rows", (10, 40)),
    ],
    procedures: &["reel change", "format change", "end of shift cleaning", "batch closing"],
    steps: &["stop belt", "open guard", "empty bin", "scan job card", "wipe rollers", "load reel", "print last label"],
    between_steps: ", then ",
    status: Wordings {
        asked: &[
            "how many packs from the <part>?",
            "<part>, are you fine?",
            "count for <part>",
            "what light has the <part>?",
            "tell me about the <part>",
            "line check, <part>",
        ],
        answer: "station <tag> has a <state> light | <first> packs a minute | <second> rejects | clean after <hours> hours",
    },
    alarm: Wordings {
        asked: &[
            "stop code J<code>",
            "J<code> blinks",
            "line stopped, J<code>",
            "J<code>, who can fix it?",
            "what is J<code>",
        ],
        answer: "stop J<code> | <meaning> | operator: <remedy> | restart with the green button",
    },
    set_point: Wordings {
        asked: &[
            "recipe <point>?",
            "how much is the <point>?",
            "check recipe for <point>",
            "<point> today?",
            "look up <point>",
        ],
        answer: "recipe | <point> | <value> <unit> | from <low> up to <high> | locked for this batch",
    },
    procedure: Wordings {
        asked: &["teach me <name>", "card for <name>", "what do I do at <name>?", "<name> instructions"],
        answer: "card | <name> | <steps> | sign the sheet",
    },
    obeyed: Wordings {
        asked: &["make the <point> <asked>", "recipe change, <point> <asked> <unit>", "use <asked> <unit> for <point>"],
        answer: "recipe saved | <point> | was <value> | is <asked> <unit>",
    },
    refused: Wordings {
        asked: &["make the <point> <asked>", "recipe change, <point> <asked> <unit>", "use <asked> <unit> for <point>"],
        answer: "recipe rejected | <point> | <asked> <unit> | ask the foreman to go above <high>",
    },
    normal: Wordings {
        asked: &["count <tag> <read> per minute", "<part> makes <read> a minute", "tally <read> on <tag>"],
        answer: "tally | <tag> | <read> packs a minute | steady below <limit> | belt unchanged",
    },
    high: Wordings {
        asked: &["count <tag> <read> per minute", "<part> makes <read> a minute", "tally <read> on <tag>"],
        answer: "tally | <tag> | <read> packs a minute | too fast above <limit> | belt slowed",
    },
};

const CHILLER: Grammar = Grammar {
    kind: "chiller",
    parts: &[
        ("CPR.A", "compressor A"),
        ("CPR.B", "compressor B"),
        ("EVAP", "evaporator"),
        ("COND", "condenser fan"),
        ("BRINE", "brine pump"),
        ("TWR", "cooling tower"),
    ],
    states: &["loaded", "unloaded", "standby"],
    first: (40, 160),
    second: (4, 30),
    alarms: &[
        ("suction pressure low", "look for a refrigerant leak"),
        ("discharge superheat high", "clean the condenser coil"),
        ("frost on evaporator", "start a hot gas defrost"),
        ("oil return poor", "raise the load for an hour"),
        ("brine too weak", "add glycol to tank B"),
        ("tower fan vibration", "balance the fan blades"),
        ("flow switch open", "bleed air at the pump"),
        ("ammonia trace", "leave the room and ventilate"),
    ],
    set_points: &[
        ("leaving water temperature", "dK", (50, 120)),
        ("suction pressure", "kPa", (180, 420)),
        ("superheat", "dK", (40, 110)),
        ("brine flow", "m3/h", (30, 110)),
        ("condensing pressure", "kPa", (900, 1700)),
        ("defrost interval", "min", (120, 620)),
    ],
    procedures: &["seasonal start", "hot gas defrost", "pump down", "tower dosing"],
    steps: &[
        "shut KV8",
        "drain sump",
        "sight glass clear",
        "heater on",
        "bypass at half",
        "trend for ten minutes",
        "meter out",
    ],
    between_steps: " > ",
    status: Wordings {
        asked: &[
            "trend of <part>",
            "what is going on at <part>?",
            "duty and lift of <part>",
            "condition of the <part>",
            "poll <part>",
            "any news from <part>?",
        ],
        answer: "[<tag>] <state>: duty <first> kW, approach <second> K, inspect after <hours> run hours",
    },
    alarm: Wordings {
        asked: &[
            "event K-<code>",
            "K-<code> came up",
            "decode K-<code>",
            "reason for K-<code>?",
            "plant tripped on K-<code>",
        ],
        answer: "[EVENT K-<code>] <meaning>; advice: <remedy>; resets itself",
    },
    set_point: Wordings {
        asked: &[
            "target for <point>?",
            "what <point> do we hold?",
            "control value of <point>",
            "<point> target",
            "recall <point>",
        ],
        answer: "[CTRL] holding <point> at <value> <unit> inside band <low>..<high>",
    },
    procedure: Wordings {
        asked: &["sequence for <name>", "prepare a <name>", "order of work, <name>", "explain the <name>"],
        answer: "[SEQ <name>] <steps>, hand back to automatic",
    },
    obeyed: Wordings {
        asked: &["hold <point> at <asked>", "move <point> to <asked> <unit>", "new target <asked> <unit> for <point>"],
        answer: "[CTRL] ramping <point> from <value> to <asked> <unit>",
    },
    refused: Wordings {
        asked: &["hold <point> at <asked>", "move <point> to <asked> <unit>", "new target <asked> <unit> for <point>"],
        answer: "[CTRL] denied, <point> of <asked> <unit> leaves the band at <high>",
    },
    normal: Wordings {
        asked: &["sample <tag> <read> kW", "<part> draws <read> kW", "meter on <tag> says <read> kW"],
        answer: "[<tag>] sample <read> kW stored, below ceiling <limit> kW, stages unchanged",
    },
    high: Wordings {
        asked: &["sample <tag> <read> kW", "<part> draws <read> kW", "meter on <tag> says <read> kW"],
        answer: "[<tag>] sample <read> kW breaks ceiling <limit> kW, unloading one stage",
    },
};

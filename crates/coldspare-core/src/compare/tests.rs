use super::*;

/// A tree in memory; an entry is a byte.
#[derive(Default, Clone)]
struct Memory(BTreeMap<Vec<u8>, u8>, Without, Option<Cut>);

impl Tree for Memory {
    type Error = std::convert::Infallible;

    fn keys(&self, span: &Span, each: &mut dyn FnMut(&[u8]) -> bool) -> Result<(), Self::Error> {
        self.entries(span, &mut |key, _| each(key))
    }

    fn entries(&self, span: &Span, each: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<(), Self::Error> {
        let rows = self.0.range(span.from.clone()..).take_while(|(key, _)| span.is_before_end(key));
        for (key, entry) in rows.filter(|(key, _)| self.1.takes_part(key)) {
            if !each(key, &[*entry]) {
                break;
            }
        }
        Ok(())
    }

    fn whole(&self) -> Option<&Cut> {
        self.2.as_ref()
    }
}

/// All of a tree in parts.
fn cut_once(tree: &Memory) -> Cut {
    let mut cutter = Cutter::new(tree.0.len() as u64);
    tree.0.iter().for_each(|(key, entry)| cutter.add(key, &[*entry]));
    cutter.finish()
}

fn path(text: &str) -> RelPath {
    if text.is_empty() { RelPath::root() } else { RelPath::new(text.as_bytes()).unwrap() }
}

fn at(text: &str) -> Vec<u8> {
    key::encode(RootId(0), &path(text))
}

/// `count` files in folders, with all folders.
fn tree(count: u32) -> Memory {
    let mut rows = BTreeMap::from([(at(""), 0)]);
    for n in 0..count {
        rows.insert(at(&format!("{:02}", n % 50)), 1);
        rows.insert(at(&format!("{:02}/{n}", n % 50)), 2);
    }
    Memory(rows, Without::default(), None)
}

fn compare(here: &Memory, there: &Memory) -> (Found, u32) {
    let mut comparison = Comparison::default();
    while let Some(spans) = comparison.ask() {
        assert!(Span::are_disjoint(spans) && spans.len() <= SPANS_MAX, "{spans:?}");
        let cuts = answer(there, spans).unwrap();
        assert!(cuts.iter().all(|cut| cut.parts.len() <= PARTS_MAX));
        comparison.answered(here, &cuts).unwrap();
    }
    let rounds = comparison.rounds;
    (comparison.finish(), rounds)
}

fn named(found: &Found) -> BTreeSet<(String, How)> {
    found.differences.iter().map(|d| (d.path.to_string(), d.how)).collect()
}

impl PartialOrd for How {
    fn partial_cmp(&self, other: &How) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for How {
    fn cmp(&self, other: &How) -> std::cmp::Ordering {
        (*self as u8).cmp(&(*other as u8))
    }
}

#[test]
fn equal_trees_take_one_question() {
    for count in [0, 1, 100, 20_000] {
        let tree = tree(count);
        let (found, rounds) = compare(&tree, &tree.clone());
        assert_eq!((found.entries, found.differences.len(), found.has_more, rounds), (tree.0.len() as u64, 0, false, 1));
    }
    let none = Memory::default();
    assert_eq!(compare(&none, &none).0, Found { entries: 0, differences: Vec::new(), has_more: false });
}

#[test]
fn a_tree_that_is_gone_over_once_is_cut_as_it_is_compared() {
    for count in [0, 1, 127, 128, 129, 5000] {
        let tree = tree(count);
        let cut = cut_once(&tree);
        assert!(cut.parts.len() <= PARTS_MAX && (count < 128 || cut.parts.len() >= PARTS_MAX / 2), "{} parts", cut.parts.len());
        let mut comparison = Comparison::default();
        comparison.ask().unwrap();
        comparison.answered(&tree, &[cut]).unwrap();
        assert_eq!(comparison.ask(), None);
        assert_eq!(comparison.finish(), Found { entries: tree.0.len() as u64, differences: Vec::new(), has_more: false });
    }
}

#[test]
fn a_side_that_was_cut_ahead_reads_nothing_where_both_are_equal() {
    let there = Memory(tree(5000).0, Without::default(), Some(cut_once(&tree(5000))));
    let unread = Memory(BTreeMap::new(), Without::default(), there.2.clone());
    let equal = Found { entries: there.0.len() as u64, differences: Vec::new(), has_more: false };
    assert_eq!(compare(&unread, &there), (equal, 1));
    let mut here = tree(5000);
    here.0.insert(at("07/57"), 3);
    here.2 = Some(cut_once(&here));
    assert_eq!(named(&compare(&here, &there).0), BTreeSet::from([("07/57".into(), How::Differs)]));
}

#[test]
fn every_difference_is_named_and_nothing_else() {
    let mut random = 7u64;
    let mut below = move |limit: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % limit
    };
    for _ in 0..200 {
        let mut here = tree(1 + below(3000) as u32);
        let mut there = here.clone();
        let keys: Vec<Vec<u8>> = here.0.keys().cloned().collect();
        let mut expected = BTreeSet::new();
        for _ in 0..below(40) {
            let key = keys[below(keys.len() as u64) as usize].clone();
            let name = key::decode(&key).unwrap().1.to_string();
            if expected.iter().any(|(n, _)| *n == name) {
                continue;
            }
            let how = match below(3) {
                0 => {
                    here.0.remove(&key);
                    How::OnlyThere
                }
                1 => {
                    there.0.remove(&key);
                    How::OnlyHere
                }
                _ => {
                    here.0.insert(key, 9);
                    How::Differs
                }
            };
            expected.insert((name, how));
        }
        let (found, rounds) = compare(&here, &there);
        assert_eq!(named(&found), expected);
        assert!(!found.has_more && rounds < 12, "{rounds} questions");
    }
}

#[test]
fn of_many_differences_some_are_named() {
    let (all, none, some) = (tree(20_000), Memory::default(), tree(3));
    for (here, there) in [(&all, &none), (&none, &all), (&all, &some), (&some, &all)] {
        let (found, rounds) = compare(here, there);
        assert!(found.has_more && found.differences.len() == DIFFERENCES_MAX, "{found:?}");
        assert!(rounds < ROUNDS_MAX, "{rounds} questions");
    }
    let nothing_like_it = Memory(all.0.keys().map(|key| (key.clone(), 9)).collect(), Without::default(), None);
    assert!(compare(&all, &nothing_like_it).0.has_more);
}

#[test]
fn what_is_left_out_takes_part_on_neither_side() {
    let left_out = |text: &str, extent| LeftOut { root: RootId(0), path: path(text), extent };
    let without = Without::new(&[left_out("01", Extent::All), left_out("02", Extent::Itself), left_out("03/3", Extent::All)]);
    for (text, expected) in [("", true), ("01", false), ("01/1", false), ("01/1/x/y", false), ("010", true), ("01-x/y", true)] {
        assert_eq!(without.takes_part(&at(text)), expected, "{text}");
    }
    for (text, expected) in [("02", false), ("02/2", true), ("03", true), ("03/3", false), ("03/3/x", false), ("03/30", true)] {
        assert_eq!(without.takes_part(&at(text)), expected, "{text}");
    }
    assert!(without.takes_part(&key::encode(RootId(1), &path("01"))));
    let (mut here, mut there) = (tree(1000), tree(1000));
    (here.1, there.1) = (without.clone(), without);
    for text in ["01", "01/1", "01/51", "02", "03/3"] {
        here.0.remove(&at(text));
        there.0.insert(at(text), 9);
    }
    there.0.insert(at("03/3/new"), 9);
    assert!(compare(&here, &there).0.differences.is_empty());
    here.0.remove(&at("02/2"));
    assert_eq!(named(&compare(&here, &there).0), BTreeSet::from([("02/2".to_string(), How::OnlyThere)]));
}

#[test]
fn too_much_to_leave_out_is_left_out_by_folders() {
    let mut gather = Gather::default();
    for n in 0..20_000u32 {
        gather.add(RootId(0), path(&format!("a/{}/{n}", n % 10)), Extent::Itself);
    }
    gather.add(RootId(0), path("b"), Extent::Itself);
    gather.add(RootId(0), path("c/d"), Extent::Itself);
    gather.add(RootId(0), path("c"), Extent::All);
    let list = gather.finish();
    let names: Vec<String> = list.iter().map(|l| format!("{} {:?}", l.path, l.extent)).collect();
    let mut expected: Vec<String> = (0..10).map(|n| format!("a/{n} All")).collect();
    expected.extend(["b Itself".into(), "c All".into()]);
    assert_eq!(names, expected);
    let mut gather = Gather::default();
    for n in 0..2000u32 {
        gather.add(RootId(0), path(&format!("{n}")), Extent::Itself);
    }
    assert_eq!(gather.finish(), [LeftOut { root: RootId(0), path: RelPath::root(), extent: Extent::All }]);
}

#[test]
fn an_answer_to_something_else_is_refused() {
    let here = tree(10);
    let part = |text: &str| Part { first: at(text), tally: Tally { entries: 1, digest: Digest([0; 32]) } };
    let check = |cuts: &[Cut]| {
        let mut comparison = Comparison::default();
        comparison.ask().unwrap();
        matches!(comparison.answered(&here, cuts), Err(AnswerError::Protocol(_)))
    };
    let cut = |parts: &[Part]| Cut { parts: parts.to_vec() };
    assert!(check(&[]));
    assert!(check(&[cut(&[]), cut(&[])]));
    assert!(check(&[cut(&[part("b"), part("a")])]));
    assert!(check(&[cut(&[part("a"), part("a")])]));
    assert!(!check(&[cut(&[part("a"), part("b")])]));
    let no_key = Part { first: vec![7], tally: Tally { entries: 1, digest: Digest([0; 32]) } };
    assert!(check(&[cut(&[no_key])]));
    // One that never comes to an end is not asked for ever.
    let mut comparison = Comparison::default();
    let endless = Part { first: at(""), tally: Tally { entries: 2, digest: Digest([0; 32]) } };
    while comparison.ask().is_some() {
        comparison.answered(&here, &[cut(std::slice::from_ref(&endless))]).unwrap();
    }
    assert_eq!((comparison.rounds, comparison.finish().has_more), (ROUNDS_MAX, true));
}

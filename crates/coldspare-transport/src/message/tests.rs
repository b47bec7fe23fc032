use coldspare_core::changeset::FilePart;
use coldspare_core::compare::{Extent, Part, Tally};
use coldspare_core::control::Place;
use coldspare_core::{Body, ContentRef, Digest, Entry, Meta, SessionId, Time, Xattr};
use data_encoding::HEXLOWER;
use proptest::prelude::*;

use super::*;

fn path(text: &str) -> RelPath {
    RelPath::new(text.as_bytes()).unwrap()
}

fn session() -> Session {
    Session { epoch: Epoch(2), id: SessionId([0x33; 16]), opened_by: NodeId([0x22; 16]) }
}

fn open() -> Open {
    Open {
        versions: VersionRange { min: 1, max: 3 },
        build: "0.1.0".into(),
        cluster: ClusterId([0x11; 16]),
        node: NodeId([0x22; 16]),
        session: session(),
        secret: Some(Secret([0x44; 16])),
        roots: vec![RootInfo { name: "home".into(), path: b"/srv/\xff".to_vec() }],
        chunking: 1,
    }
}

fn file(size: u64) -> Entry {
    let xattrs = vec![Xattr { name: b"user.a".to_vec(), value: vec![1, 2] }];
    let meta = Meta { mode: 0o640, uid: 1000, gid: 70_000, mtime: Time { secs: -1, nanos: 999_999_999 }, xattrs };
    Entry { meta, body: Body::File { size, digest: Digest([0x55; 32]), sparse: true } }
}

fn other(body: Body) -> Entry {
    Entry { meta: Meta { mode: 0o777, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new() }, body }
}

fn put(name: &str, entry: Entry, content: ContentRef) -> Op {
    Op::Put { root: RootId(0), path: path(name), entry, content }
}

/// Checks that a message has exactly these bytes, for ever, and comes back from them.
fn golden<M: Serialize + DeserializeOwned + PartialEq + fmt::Debug>(message: M, hex: &str) {
    let bytes = codec::encode(&message);
    assert_eq!(HEXLOWER.encode(&bytes), hex, "{message:?}");
    assert_eq!(codec::decode::<M>(&bytes).unwrap(), message);
}

#[test]
fn golden_to_standby() {
    golden(
        ToStandby::Open(open()),
        "00010305302e312e301111111111111111111111111111111122222222222222222222222222222222023333333333333333333333333333\
         33332222222222222222222222222222222201444444444444444444444444444444440104686f6d65062f7372762fff01",
    );
    golden(
        ToStandby::Open(Open { secret: None, roots: Vec::new(), ..open() }),
        "00010305302e312e301111111111111111111111111111111122222222222222222222222222222222023333333333333333333333333333\
         333322222222222222222222222222222222000001",
    );
    golden(ToStandby::Begin { seq: Seq(5), baseline: Baseline::Delta(Seq(4)), sure: true, acked: Seq(3) }, "010500040103");
    golden(ToStandby::Begin { seq: Seq(300), baseline: Baseline::Full, sure: false, acked: Seq(0) }, "01fb2c01010000");
    let ask = Ask { root: RootId(1), path: path("a/b"), digest: Digest([0x55; 32]), size: 70_000 };
    golden(
        ToStandby::Ask { no: 7, items: vec![ask] },
        "0207010103612f625555555555555555555555555555555555555555555555555555555555555555fc70110100",
    );
    let totals = Totals { ops: 9, files_read: 2, bytes_read: 1 << 33 };
    golden(
        ToStandby::End { seq: Seq(5), as_of_ms: 1_700_000_000_000, batches: 1, segments: 2, totals },
        "0305fd0068e5cf8b01000001020902fd0000000002000000",
    );
    golden(ToStandby::Abandon { seq: Seq(5) }, "0405");
    golden(ToStandby::Idle { as_of_ms: 1_700_000_000_000 }, "05fd0068e5cf8b010000");
    let problem = Problem { root: RootId(1), path: path("a"), kind: coldspare_core::ProblemKind::Damaged, detail: "why".into() };
    golden(ToStandby::HeldBack { is_first: true, problems: vec![problem] }, "0601010101610203776879");
    golden(ToStandby::Reachable { address: "a:1".into() }, "0703613a31");
    golden(ToStandby::Compare, "08");
    let place = Place { session: SessionId([0x33; 16]), seq: Seq(5) };
    let handover = Handover { place, digest: Digest([0x55; 32]) };
    let (session, digest) = ("33".repeat(16), "55".repeat(32));
    golden(ToStandby::Handover { handover, taking: Taking::Now }, &format!("09{session}05{digest}00"));
    golden(ToStandby::Handover { handover, taking: Taking::WhenPromoted }, &format!("09{session}05{digest}01"));
    let item = Ask { root: RootId(1), path: path("a/b"), digest: Digest([0x55; 32]), size: 70_000 };
    golden(ToStandby::AskBulk { no: 7, item }, &format!("0a070103612f62{digest}fc70110100"));
    golden(ToStandby::BulkOver, "0b");
    golden(ToStandby::Point { no: 7, seq: Seq(5) }, "0c0705");
    golden(ToStandby::NotCompared { no: 7, why: "why".into() }, "0d0703776879");
    let left_out =
        [(path("a"), Extent::Itself), (path("a/b"), Extent::All)].map(|(path, extent)| LeftOut { root: RootId(1), path, extent });
    golden(ToStandby::LeftOut { no: 7, left_out: left_out.to_vec() }, "0e0702010161000103612f6201");
    golden(ToStandby::Cuts { no: 7, cuts: cuts() }, &format!("0f07020103010061fb2c01{digest}00"));
}

fn cuts() -> Vec<Cut> {
    let tally = Tally { entries: 300, digest: Digest([0x55; 32]) };
    vec![Cut { parts: vec![Part { first: b"\x01\0a".to_vec(), tally }] }, Cut { parts: Vec::new() }]
}

#[test]
fn golden_to_active() {
    let applied = Applied { session: SessionId([0x33; 16]), seq: Seq(4), as_of_ms: 1_700_000_000_000 };
    let welcome = Welcome {
        version: 1,
        build: "0.1.0".into(),
        node: NodeId([0x66; 16]),
        promised: Epoch(2),
        applied: Some(applied),
        staged_files: 251,
    };
    golden(
        ToActive::Welcome(welcome.clone()),
        "000105302e312e306666666666666666666666666666666602013333333333333333333333333333333304fd0068e5cf8b010000fbfb00",
    );
    golden(ToActive::Welcome(Welcome { applied: None, ..welcome }), "000105302e312e30666666666666666666666666666666660200fbfb00");
    golden(ToActive::Answer { no: 7, have: vec![Have::Missing, Have::AtPath, Have::Staged] }, "020703000102");
    golden(ToActive::Answer { no: 7, have: vec![Have::Part(vec![[0x77; 16]]), Have::NoRoom] }, &format!("0207020301{}04", "77".repeat(16)));
    golden(ToActive::Acked { seq: Seq(5), as_of_ms: 1_700_000_000_000 }, "0305fd0068e5cf8b010000");
    golden(ToActive::Incomplete { seq: Seq(5), repositories: vec![(RootId(1), path("a"))] }, "050501010161");
    golden(ToActive::Tree { applied: None, digest: Digest([0x55; 32]), problems: 2 }, &format!("0600{}02", "55".repeat(32)));
    golden(ToActive::Taken { session: session() }, &format!("0702{}{}", "33".repeat(16), "22".repeat(16)));
    golden(ToActive::Noted, "08");
    golden(ToActive::NotTaken(Refusal::Handover("why".into())), "090b03776879");
    golden(ToActive::AskPoint { no: 7 }, "0a07");
    golden(ToActive::AskCuts { no: 7, spans: vec![span("", "a"), span("b", "")] }, "0b0702000161016200");
    golden(ToActive::SendAgain { paths: vec![(RootId(1), path("a"))] }, "0c01010161");
}

fn span(from: &str, to: &str) -> Span {
    Span { from: from.into(), to: to.into() }
}

#[test]
fn spans_and_parts_beyond_their_limits_are_refused() {
    let ask = |spans: Vec<Span>| decode_control::<ToActive>(&codec::encode(&ToActive::AskCuts { no: 1, spans }));
    assert!(ask(vec![span("a", "b"), span("b", "")]).is_ok());
    for spans in [
        vec![span("a", "c"), span("b", "d")],
        vec![span("b", ""), span("c", "")],
        vec![span("b", "b")],
        vec![span("c", "d"), span("a", "b")],
    ] {
        assert!(matches!(ask(spans.clone()), Err(MessageError::Spans)), "{spans:?}");
    }
    let many = |count: u8| (0..count).map(|n| Span { from: vec![n], to: vec![n, 0] }).collect::<Vec<_>>();
    assert!(ask(many(16)).is_ok() && ask(many(17)).is_err());
    let part = |n: u8| Part { first: vec![n], tally: Tally { entries: 1, digest: Digest([0; 32]) } };
    let cuts = |count: u8| ToStandby::Cuts { no: 1, cuts: vec![Cut { parts: (0..count).map(part).collect() }] };
    let decoded = |message: &ToStandby| decode_control::<ToStandby>(&codec::encode(message)).is_ok();
    assert!(decoded(&cuts(128)) && !decoded(&cuts(129)));
    assert!(cuts(128).check().is_ok() && cuts(129).check().is_err());
    let left_out = |count: usize| ToStandby::LeftOut {
        no: 1,
        left_out: vec![LeftOut { root: RootId(0), path: path("a"), extent: Extent::All }; count],
    };
    assert!(decoded(&left_out(1024)) && !decoded(&left_out(1025)));
    let again = |count: usize| ToActive::SendAgain { paths: vec![(RootId(0), path("a")); count] };
    assert!(again(200).check().is_ok() && decode_control::<ToActive>(&codec::encode(&again(201))).is_err());
}

#[test]
fn golden_refusals() {
    let (standby, active) = (ClusterId([0x11; 16]), ClusterId([0x12; 16]));
    golden(ToActive::Refused(Refusal::UnknownKey), "0100");
    golden(ToActive::Refused(Refusal::Invitation), "0101");
    golden(ToActive::Refused(Refusal::Cluster { standby, active }), "01021111111111111111111111111111111112121212121212121212121212121212");
    golden(ToActive::Refused(Refusal::Role("active".into())), "010306616374697665");
    golden(ToActive::Refused(Refusal::Epoch { promised: Epoch(3), offered: Epoch(2) }), "01040302");
    golden(ToActive::Refused(Refusal::Conflict(Epoch(3))), "010503");
    golden(ToActive::Refused(Refusal::Version { min: 2, max: 3 }), "01060203");
    golden(ToActive::Refused(Refusal::Roots("why".into())), "010703776879");
    golden(ToActive::Refused(Refusal::Busy), "0108");
    golden(ToActive::Refused(Refusal::Unable("why".into())), "010903776879");
    golden(ToActive::Refused(Refusal::Superseded(SessionId([0x33; 16]))), &format!("010a{}", "33".repeat(16)));
    golden(ToActive::Refused(Refusal::Handover("why".into())), "010b03776879");
}

#[test]
fn golden_failures() {
    let failed = |failure| ToActive::Failed { seq: Seq(5), failure };
    golden(failed(Failure::BaseDiffers { root: RootId(1), path: path("a") }), "040500010161");
    golden(failed(Failure::ContentDiffers { root: RootId(1), path: path("a") }), "040501010161");
    golden(failed(Failure::UnknownTarget { root: RootId(1), path: path("a") }), "040502010161");
    golden(failed(Failure::Totals), "040503");
    golden(failed(Failure::OutOfSpace("why".into())), "04050403776879");
    golden(failed(Failure::Io("why".into())), "04050503776879");
    golden(failed(Failure::Protocol("why".into())), "04050603776879");
    golden(failed(Failure::Sequence { applied: Seq(4) }), "04050704");
    golden(failed(Failure::Held("why".into())), "04050803776879");
}

#[test]
fn golden_data() {
    let batch = |op| Data::Batch { seq: Seq(5), ops: vec![op] };
    golden(
        batch(put("a", file(3), ContentRef::Inline)),
        "00050100000161fba001fbe803fc7011010001fcffc99a3b0106757365722e61020102010355555555555555555555555555555555555555\
         555555555555555555555555550101",
    );
    golden(
        batch(put("a", file(3), ContentRef::Segments { file: 1, segments: 300 })),
        "00050100000161fba001fbe803fc7011010001fcffc99a3b0106757365722e61020102010355555555555555555555555555555555555555\
         55555555555555555555555555010201fb2c01",
    );
    golden(
        batch(put("a", file(3), ContentRef::Unchanged)),
        "00050100000161fba001fbe803fc7011010001fcffc99a3b0106757365722e61020102010355555555555555555555555555555555555555\
         555555555555555555555555550103",
    );
    golden(
        batch(put("a", file(3), ContentRef::Staged)),
        "00050100000161fba001fbe803fc7011010001fcffc99a3b0106757365722e61020102010355555555555555555555555555555555555555\
         555555555555555555555555550104",
    );
    golden(
        batch(put("a", file(3), ContentRef::Rebuilt { recipe_bytes: 300 })),
        "00050100000161fba001fbe803fc7011010001fcffc99a3b0106757365722e61020102010355555555555555555555555555555555555555\
         555555555555555555555555550105fb2c01",
    );
    golden(batch(put("", other(Body::Dir), ContentRef::None)), "000501000000fbff0100000000000000");
    golden(
        batch(put("a", other(Body::Symlink { target: b"../b".to_vec() }), ContentRef::None)),
        "00050100000161fbff01000000000002042e2e2f6200",
    );
    golden(batch(put("a", other(Body::Hardlink { to: path("b/c") }), ContentRef::None)), "00050100000161fbff0100000000000303622f6300");
    golden(batch(Op::Delete { root: RootId(1), path: path("a/b") }), "000501010103612f62");
    golden(batch(Op::Rename { root: RootId(1), from: path("a"), to: path("b") }), "000501030101610162");
    golden(
        Data::Segment {
            seq: Seq(5),
            part: FilePart { file: 1, root: RootId(2), path: path("a"), offset: 1 << 22, sources: vec![], pieces: vec![0xab, 0xcd] },
        },
        "010501020161fc000040000002abcd",
    );
    golden(
        Data::Bulk {
            part: FilePart { file: 1, root: RootId(2), path: path("a"), offset: 1 << 22, sources: vec![], pieces: vec![0xab, 0xcd] },
        },
        "0201020161fc000040000002abcd",
    );
    let end = BulkEnd { file: 1, root: RootId(2), path: path("a"), digest: Digest([0x55; 32]), size: 300, segments: 2 };
    golden(Data::BulkEnd { no: 7, end }, &format!("030701020161{}fb2c0102", "55".repeat(32)));
}

fn check_open(change: impl FnOnce(&mut Open), accepted: bool) {
    let mut open = open();
    change(&mut open);
    let decoded = decode_control::<ToStandby>(&codec::encode(&ToStandby::Open(open.clone())));
    assert_eq!(decoded.is_ok(), accepted, "{open:?}");
}

#[test]
fn an_open_that_makes_no_sense_is_refused() {
    let root = |name: &str, path: &str| RootInfo { name: name.into(), path: path.into() };
    check_open(|_| {}, true);
    check_open(|open| open.versions.min = 0, false);
    check_open(|open| open.versions.min = 4, false);
    check_open(|open| open.build = "x".repeat(TEXT_BYTES_MAX + 1), false);
    check_open(|open| open.roots = (0..64).map(|n| root(&format!("r{n}"), &format!("/{n}"))).collect(), true);
    check_open(|open| open.roots = (0..65).map(|n| root(&format!("r{n}"), &format!("/{n}"))).collect(), false);
    check_open(|open| open.roots.push(root("home", "/other")), false);
    check_open(|open| open.roots.push(root("other", "relative")), false);
    check_open(|open| open.roots.push(root("other", "/a\0b")), false);
    check_open(|open| open.roots.push(root("", "/a")), false);
    check_open(|open| open.roots.push(root("a\nb", "/a")), false);
    check_open(|open| open.roots.push(root(&"x".repeat(64), "/a")), true);
    check_open(|open| open.roots.push(root(&"x".repeat(65), "/a")), false);
}

#[test]
fn lists_stop_at_their_limit() {
    let ask = Ask { root: RootId(0), path: path("a"), digest: Digest([0; 32]), size: 1 };
    let asks = |count| codec::encode(&ToStandby::Ask { no: 1, items: vec![ask.clone(); count] });
    assert!(decode_control::<ToStandby>(&asks(1024)).is_ok());
    assert!(matches!(decode_control::<ToStandby>(&asks(1025)), Err(MessageError::Decode(_))), "stopped while decoding");
    let answers = |count| codec::encode(&ToActive::Answer { no: 1, have: vec![Have::Missing; count] });
    assert!(decode_control::<ToActive>(&answers(1024)).is_ok());
    assert!(matches!(decode_control::<ToActive>(&answers(1025)), Err(MessageError::Decode(_))));
    let delete = Op::Delete { root: RootId(0), path: path("a") };
    let batch = |count| codec::encode(&Data::Batch { seq: Seq(1), ops: vec![delete.clone(); count] });
    assert!(decode_data(&batch(BATCH_OPS_MAX), 0).is_ok());
    assert!(matches!(decode_data(&batch(BATCH_OPS_MAX + 1), 0), Err(MessageError::Decode(_))));
    let too_many = ToStandby::Ask { no: 1, items: vec![ask; 1025] };
    assert!(matches!(too_many.check(), Err(MessageError::Count { count: 1025, .. })), "a sender notices too");
}

#[test]
fn texts_stop_at_their_limit() {
    let long = || "x".repeat(TEXT_BYTES_MAX + 1);
    for message in [ToActive::Failed { seq: Seq(1), failure: Failure::Io(long()) }, ToActive::Refused(Refusal::Unable(long()))] {
        assert!(matches!(decode_control::<ToActive>(&codec::encode(&message)), Err(MessageError::Text(_))));
    }
}

fn check_batch(ops: Vec<Op>, payload_bytes: u64, accepted: bool) {
    let body = codec::encode(&Data::Batch { seq: Seq(1), ops });
    assert_eq!(decode_data(&body, payload_bytes).is_ok(), accepted, "{payload_bytes}");
}

#[test]
fn a_batch_and_its_payload_agree() {
    let two = || vec![put("a", file(3), ContentRef::Inline), put("b", file(4), ContentRef::Inline)];
    check_batch(two(), 7, true);
    check_batch(two(), 6, false);
    check_batch(two(), 8, false);
    check_batch(vec![put("a", file(3), ContentRef::Unchanged)], 0, true);
    check_batch(vec![put("a", file(3), ContentRef::Staged)], 3, false);
    let rebuilt = |recipe_bytes| vec![put("a", file(3), ContentRef::Rebuilt { recipe_bytes })];
    check_batch(rebuilt(4), 4, true);
    check_batch(rebuilt(4), 3, false);
    check_batch(rebuilt(u32::MAX), u64::from(u32::MAX), false);
    check_batch(vec![put("a", file(u64::MAX), ContentRef::Inline), put("b", file(2), ContentRef::Inline)], 1, false);
    check_batch(vec![put("a", other(Body::Dir), ContentRef::Inline)], 0, false);
    check_batch(vec![Op::Delete { root: RootId(64), path: path("a") }], 0, false);
}

#[test]
fn the_highest_common_version_is_spoken() {
    let range = |min, max| VersionRange { min, max };
    assert_eq!(range(1, 1).highest_common(range(1, 3)), Some(1));
    assert_eq!(range(2, 5).highest_common(range(3, 9)), Some(5));
    assert_eq!(range(1, 2).highest_common(range(3, 4)), None);
    assert_eq!(range(3, 4).highest_common(range(1, 2)), None);
}

#[test]
fn failures_are_safe_to_print() {
    let failure = Failure::BaseDiffers { root: RootId(3), path: path("a\nb") };
    assert!(failure.to_string().starts_with("a\\u{a}b in root 3 "), "{failure}");
    assert!(!Failure::Io("\u{1b}[2J".into()).to_string().contains('\u{1b}'));
}

fn any_path() -> impl Strategy<Value = RelPath> {
    prop::collection::vec("[a-z.]{1,12}", 0..4).prop_filter_map("a path", |parts| RelPath::new(parts.join("/").into_bytes()).ok())
}

fn any_op() -> impl Strategy<Value = Op> {
    let bytes = || prop::collection::vec(1u8.., 1..20);
    let body = prop_oneof![
        Just(Body::Dir),
        (any::<u64>(), any::<[u8; 32]>(), any::<bool>()).prop_map(|(size, digest, sparse)| Body::File {
            size,
            digest: Digest(digest),
            sparse
        }),
        bytes().prop_map(|target| Body::Symlink { target }),
        any_path().prop_map(|to| Body::Hardlink { to }),
    ];
    let content = prop_oneof![
        Just(ContentRef::None),
        Just(ContentRef::Inline),
        Just(ContentRef::Unchanged),
        Just(ContentRef::Staged),
        any::<u32>().prop_map(|recipe_bytes| ContentRef::Rebuilt { recipe_bytes }),
        (any::<u32>(), any::<u32>()).prop_map(|(file, segments)| ContentRef::Segments { file, segments }),
    ];
    let meta = (any::<u16>(), any::<u32>(), any::<u32>(), any::<i64>(), any::<u32>(), prop::collection::vec((bytes(), bytes()), 0..3))
        .prop_map(|(mode, uid, gid, secs, nanos, xattrs)| {
            let xattrs = xattrs.into_iter().map(|(name, value)| Xattr { name, value }).collect();
            Meta { mode, uid, gid, mtime: Time { secs, nanos }, xattrs }
        });
    let put = (any::<u8>(), any_path(), meta, body, content).prop_map(|(root, path, meta, body, content)| Op::Put {
        root: RootId(root),
        path,
        entry: Entry { meta, body },
        content,
    });
    prop_oneof![put, (any::<u8>(), any_path()).prop_map(|(root, path)| Op::Delete { root: RootId(root), path })]
}

fn any_data() -> impl Strategy<Value = Data> {
    let batch = (any::<u64>(), prop::collection::vec(any_op(), 0..8)).prop_map(|(seq, ops)| Data::Batch { seq: Seq(seq), ops });
    let segment =
        (any::<u64>(), any::<u32>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..100)).prop_map(|(seq, file, offset, pieces)| {
            Data::Segment {
                seq: Seq(seq),
                part: FilePart { file, root: RootId(1), path: path("a/b"), offset, sources: vec![(RootId(0), path("c"))], pieces },
            }
        });
    prop_oneof![batch, segment]
}

proptest! {
    #[test]
    fn any_data_survives_the_wire(data in any_data()) {
        prop_assert_eq!(codec::decode::<Data>(&codec::encode(&data)).unwrap(), data);
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300), first in 0u8..7) {
        let mut bytes = bytes;
        bytes.insert(0, first);
        let _ = decode_control::<ToStandby>(&bytes);
        let _ = decode_control::<ToActive>(&bytes);
        let _ = decode_data(&bytes, 0);
    }
}

use super::*;
use crate::id::NodeId;

const CLUSTER: ClusterId = ClusterId([1; 16]);
const ME: NodeId = NodeId([9; 16]);
const OTHER: NodeId = NodeId([8; 16]);
const TREE: Digest = Digest([6; 32]);

fn session(epoch: u64, id: u8, by: NodeId) -> Session {
    Session { epoch: Epoch(epoch), id: SessionId([id; 16]), opened_by: by }
}

fn fresh(id: u8) -> Fresh {
    Fresh { id: SessionId([id; 16]), boot: [5; 16] }
}

fn active() -> ControlRecord {
    ControlRecord::active(CLUSTER, ME, Epoch(2), SessionId([1; 16]), [5; 16])
}

fn following(session: Session) -> ControlRecord {
    let (next, _) = step(&ControlRecord::standby(CLUSTER, ME), hello_of(session)).unwrap();
    next
}

fn hello_of(session: Session) -> Event {
    Event::Hello { cluster: CLUSTER, session }
}

fn at(session: u8, seq: u64) -> Option<Applied> {
    Some(Applied { session: SessionId([session; 16]), seq: Seq(seq), as_of_ms: 1 })
}

fn handover(session: u8, seq: u64) -> Handover {
    Handover { place: Place { session: SessionId([session; 16]), seq: Seq(seq) }, digest: TREE }
}

fn handed_over_to(record: &ControlRecord, taking: Taking, applied: Option<Applied>, digest: Digest) -> Stepped {
    step(record, Event::HandedOver { handover: handover(1, 7), taking, applied, digest, fresh: fresh(2) })
}

#[track_caller]
fn check(record: &ControlRecord, event: Event, role: Role, promised: u64, effects: &[Effect]) -> ControlRecord {
    let (next, done) = step(record, event).unwrap();
    assert_eq!((next.role, next.promised, done.as_slice()), (role, Epoch(promised), effects));
    next
}

#[test]
fn a_standby_obeys_the_highest_epoch_it_promised() {
    let new = ControlRecord::standby(CLUSTER, ME);
    check(&new, hello_of(session(1, 1, OTHER)), Role::Standby, 1, &[Effect::Store, Effect::Serve]);
    let follower = following(session(2, 1, OTHER));
    check(&follower, hello_of(session(2, 1, OTHER)), Role::Standby, 2, &[Effect::Serve]);
    check(&follower, hello_of(session(2, 2, OTHER)), Role::Standby, 2, &[Effect::Store, Effect::Serve]);
    check(&follower, hello_of(session(3, 2, NodeId([7; 16]))), Role::Standby, 3, &[Effect::Store, Effect::Serve]);
    let refused = |session| step(&follower, hello_of(session)).unwrap_err();
    assert_eq!(refused(session(1, 1, OTHER)), Refusal::Epoch { promised: Epoch(2), offered: Epoch(1) });
    assert_eq!(refused(session(2, 2, NodeId([7; 16]))), Refusal::Conflict(Epoch(2)));
    let foreign = Event::Hello { cluster: ClusterId([2; 16]), session: session(9, 9, OTHER) };
    assert!(matches!(step(&follower, foreign), Err(Refusal::Cluster { .. })));
}

#[test]
fn a_session_that_was_left_is_not_served_again() {
    let follower = following(session(2, 1, OTHER));
    let (follower, _) = step(&follower, hello_of(session(2, 2, OTHER))).unwrap();
    assert_eq!(step(&follower, hello_of(session(2, 1, OTHER))).unwrap_err(), Refusal::Superseded(SessionId([1; 16])));
    assert!(follower.obeys(SessionId([2; 16])) && !follower.obeys(SessionId([1; 16])));
}

#[test]
fn a_session_survives_a_killed_daemon_but_not_a_power_cut() {
    let goes_on = check(&active(), Event::Started(fresh(2)), Role::Active, 2, &[Effect::Store]);
    assert_eq!(goes_on.session(), active().session());
    let elsewhere = Fresh { boot: [4; 16], ..fresh(2) };
    for clean in [false, true] {
        let stopped = ControlRecord { clean, ..active() };
        let new = check(&stopped, Event::Started(elsewhere), Role::Active, 2, &[Effect::DistrustIndex, Effect::Store]);
        assert_eq!(new.session(), Some(session(2, 2, ME)));
        assert_eq!((new.boot, new.lineage.len()), ([4; 16], 2));
    }
}

#[test]
fn an_active_that_meets_a_higher_epoch_is_fenced_before_it_answers() {
    let refuse = Effect::Refuse(Refusal::Role("fenced".into()));
    let effects = [Effect::FenceSelf, Effect::Store, Effect::Alarm, refuse];
    let fenced = check(&active(), hello_of(session(3, 2, OTHER)), Role::Fenced, 3, &effects);
    check(&active(), Event::Outranked { promised: Epoch(3) }, Role::Fenced, 3, &effects[..3]);
    check(&active(), Event::Outranked { promised: Epoch(2) }, Role::Active, 2, &[]);
    // Across restarts.
    assert_eq!(step(&fenced, Event::Started(fresh(3))).unwrap_err(), Refusal::Role("fenced".into()));
    assert_eq!(step(&fenced, hello_of(session(2, 1, ME))).unwrap_err(), Refusal::Epoch { promised: Epoch(3), offered: Epoch(2) });
}

#[test]
fn two_openers_of_one_epoch_stop_each_other() {
    let effects = [Effect::FenceSelf, Effect::Store, Effect::Refuse(Refusal::Conflict(Epoch(2))), Effect::Alarm];
    let stopped = check(&active(), hello_of(session(2, 7, OTHER)), Role::Fenced, 2, &effects);
    assert_eq!(step(&stopped, hello_of(session(2, 7, OTHER))).unwrap_err(), Refusal::Conflict(Epoch(2)));
    // The one that is refused, too.
    let fenced = [Effect::FenceSelf, Effect::Store, Effect::Alarm];
    let refused = check(&active(), Event::Contested { epoch: Epoch(2) }, Role::Fenced, 2, &fenced);
    check(&refused, Event::Contested { epoch: Epoch(2) }, Role::Fenced, 2, &[]);
    check(&active(), Event::Contested { epoch: Epoch(1) }, Role::Active, 2, &[]);
    // Whichever counts is promoted, and the other one obeys it.
    let promote = Event::Promote { proof: Proof::LossAccepted, applied: None, fresh: fresh(8) };
    let (leads, _) = step(&refused, promote).unwrap();
    let (standby, _) = step(&ControlRecord { node: OTHER, ..stopped }, Event::Demote).unwrap();
    check(&standby, hello_of(leads.session().unwrap()), Role::Standby, 3, &[Effect::Store, Effect::Serve]);
}

#[test]
fn a_handover_is_stored_before_it_is_offered_and_taken_only_at_its_tree() {
    let giving = Event::HandOver { seq: Seq(7), digest: TREE };
    let offer = Effect::Offer(handover(1, 7));
    let given = check(&active(), giving, Role::Handover, 2, &[Effect::Store, offer.clone()]);
    check(&given, Event::Started(fresh(3)), Role::Handover, 2, &[Effect::Store, offer]);

    let follower = following(session(2, 1, OTHER));
    for (applied, digest) in [(at(1, 6), TREE), (at(3, 7), TREE), (None, TREE), (at(1, 7), Digest([0; 32]))] {
        assert!(matches!(handed_over_to(&follower, Taking::Now, applied, digest), Err(Refusal::Handover(_))), "{applied:?}");
    }
    let (taker, effects) = handed_over_to(&follower, Taking::Now, at(1, 7), TREE).unwrap();
    assert_eq!(effects, [Effect::Store, Effect::AnswerTaken(session(3, 2, ME))]);
    assert_eq!((taker.role, taker.promised, taker.session()), (Role::Active, Epoch(3), Some(session(3, 2, ME))));
    // The answer was lost: once more, with the same session.
    let (again, effects) = handed_over_to(&taker, Taking::Now, at(1, 7), TREE).unwrap();
    assert_eq!((again, effects), (taker, vec![Effect::AnswerTaken(session(3, 2, ME))]));

    let taken = Event::Taken { session: session(3, 2, OTHER) };
    let fenced = check(&given, taken.clone(), Role::Fenced, 3, &[Effect::Store]);
    assert_eq!(check(&fenced, taken, Role::Fenced, 3, &[Effect::Store]), fenced);
    let exact = Place { session: SessionId([2; 16]), seq: Seq(7) };
    let beyond = Place { session: SessionId([1; 16]), seq: Seq(9) };
    assert_eq!(fenced.place_after_demotion(TREE, Seq(9)), Some(exact));
    assert_eq!(fenced.place_after_demotion(Digest([0; 32]), Seq(9)), Some(beyond));
    let outranked = check(&given, Event::Outranked { promised: Epoch(3) }, Role::Fenced, 3, &[Effect::FenceSelf, Effect::Store]);
    assert_eq!(outranked.place_after_demotion(TREE, Seq(9)), Some(beyond), "nobody said what it was taken as");
    let standby = check(&fenced, Event::Demote, Role::Standby, 3, &[Effect::Store]);
    assert!(!standby.obeys(SessionId([1; 16])), "a standby that promised more obeys its own last session");
    check(&standby, hello_of(session(3, 2, OTHER)), Role::Standby, 3, &[Effect::Serve]);
}

#[test]
fn an_offer_waits_for_the_promotion_and_ends_with_its_session() {
    let follower = following(session(2, 1, OTHER));
    let (offered, effects) = handed_over_to(&follower, Taking::WhenPromoted, at(1, 7), TREE).unwrap();
    assert_eq!((offered.role, effects), (Role::Standby, vec![Effect::Store, Effect::AnswerNoted]));
    let promote = |record: &ControlRecord, applied| {
        step(record, Event::Promote { proof: Proof::Handover { digest: TREE }, applied, fresh: fresh(4) })
    };
    assert!(matches!(promote(&offered, at(1, 8)), Err(Refusal::Handover(_))));
    assert!(matches!(promote(&follower, at(1, 7)), Err(Refusal::Handover(_))));
    let (next, _) = promote(&offered, at(1, 7)).unwrap();
    assert_eq!((next.role, next.promised, next.handover), (Role::Active, Epoch(3), None));
    let (later, _) = step(&offered, hello_of(session(2, 3, OTHER))).unwrap();
    assert!(matches!(promote(&later, at(1, 7)), Err(Refusal::Handover(_))));
}

#[test]
fn a_forced_promotion_opens_the_next_epoch_once() {
    let follower = following(session(2, 1, OTHER));
    let promote = Event::Promote { proof: Proof::LossAccepted, applied: at(1, 7), fresh: fresh(4) };
    let leader = check(&follower, promote.clone(), Role::Active, 3, &[Effect::Store]);
    let parent = Place { session: SessionId([1; 16]), seq: Seq(7) };
    assert_eq!(leader.lineage.last().map(|o| (o.parent, o.reason)), Some((Some(parent), Reason::Forced)));
    assert_eq!(check(&leader, promote, Role::Active, 3, &[]), leader);
    assert_eq!(step(&leader, hello_of(session(2, 1, OTHER))).unwrap_err(), Refusal::Epoch { promised: Epoch(3), offered: Epoch(2) });
    assert_eq!(step(&leader, Event::Demote).unwrap_err(), Refusal::Role("active".into()));
}

#[test]
fn the_oldest_sessions_are_forgotten() {
    let mut record = active();
    for boot in 0..100 {
        record = step(&record, Event::Started(Fresh { id: SessionId([boot; 16]), boot: [boot; 16] })).unwrap().0;
    }
    assert_eq!(record.lineage.len(), LINEAGE_MAX);
    assert_eq!(record.session().unwrap().id, SessionId([99; 16]));
}

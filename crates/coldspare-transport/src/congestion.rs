//! How fast to send: by a model of the path (its rate, its length), in the manner of BBR (draft-ietf-ccwg-bbr).
//!
//! What is under way is kept a little above what the path holds. A lost packet alone says nothing of the rate, so that a
//! line that loses packets stays full; a queue that grows does, and so do losses that a smaller window cures. quinn has a controller of that name too: it takes the rate
//! from two acknowledgements in a row, which come in bursts, and so floods the queue (docs/decisions/0016).
//!
//! quinn paces by the window: 1.25 windows a smoothed round trip. Pure: time is what quinn says.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// Makes a controller for a connection.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ModelFactory;

/// The model of a path, and what may be under way on it.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    mtu: u64,
    phase: Phase,
    window: u64,
    /// Bytes acknowledged, and when the last were.
    delivered: u64,
    delivered_at: Option<Instant>,
    /// What was sent and may still be acknowledged.
    sent: VecDeque<Sent>,
    /// When the latest of the acknowledged packets was sent.
    newest_acked: Option<Instant>,
    /// Bytes a second, of the last rounds.
    rates: Rates,
    /// The shortest round trip, and when it was found.
    round_trip: Option<Duration>,
    round_trip_at: Option<Instant>,
    round: Round,
    /// Rounds until losses or a queue are judged again.
    settling: u32,
    gain: Gain,
    losses: Losses,
}

/// Whose fault losses are: those that a smaller window doesn't cure are the line's.
#[derive(Debug, Clone, Default)]
struct Losses {
    lost: u64,
    acked: u64,
    /// The share that is lost whatever the window is.
    by_chance: f64,
    trial: Trial,
    /// What may be under way without more being lost.
    cap: Option<u64>,
}

/// A smaller window, to see whether less is lost.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
enum Trial {
    #[default]
    None,
    /// What is judged now was still sent by the larger one, of which this share was lost.
    Begun(f64),
    Judged(f64),
}

/// What was sent at a moment, as it matters when it is acknowledged.
#[derive(Debug, Clone, Copy)]
struct Sent {
    at: Instant,
    /// What was delivered by then, and when the last of that was.
    delivered: u64,
    delivered_at: Instant,
    /// When that was sent which was acknowledged last by then.
    acked_sent_at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    /// Twice as much each round trip, until the rate or the queue says enough.
    Startup {
        /// The rate that was last a step up.
        rate: u64,
        rounds_without_growth: u32,
    },
    /// As much as the path holds, and a little more.
    Cruise,
    /// A little less for a moment, so that queues empty and the length of the path shows.
    Sound { until: Instant, shortest: Duration },
}

/// How much more than the path holds is under way.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Gain {
    Normal,
    /// As much again: others fill the queue.
    Wide,
}

/// A round trip's worth of acknowledgements.
#[derive(Debug, Clone, Copy, Default)]
struct Round {
    no: u64,
    /// It ends when something is acknowledged that was sent when this much was delivered.
    ends_at: u64,
    lost: u64,
    acked: u64,
    shortest: Option<Duration>,
}

/// The highest rate of each of the last rounds.
#[derive(Debug, Clone, Default)]
struct Rates(VecDeque<(u64, u64)>);

/// Rounds for which a rate counts.
const RATE_ROUNDS: u64 = 10;
/// How long a round trip counts as the shortest.
const ROUND_TRIP_LASTS: Duration = Duration::from_secs(10);
/// How long the path is sounded, besides a round trip.
const SOUND: Duration = Duration::from_millis(150);
/// What hosts add to a path's length: acknowledgements that wait, threads that do.
const HOSTS: Duration = Duration::from_millis(5);
/// Packets under way before anything is known.
const INITIAL_PACKETS: u64 = 32;
/// Packets by which a share of losses is judged: so many that chance doesn't decide.
const JUDGED_PACKETS: u64 = 1000;
/// LIMIT: the share of losses that may be the line's; above, the window shrinks whether or not it helps.
const CHANCE_MAX: f64 = 0.06;
/// LIMIT: packets under way at the least.
const MIN_PACKETS: u64 = 4;
/// LIMIT: transmissions that are remembered; those beyond, the oldest, give no rate.
const SENT_MAX: usize = 16_384;

impl Rates {
    fn note(&mut self, round: u64, rate: u64) {
        self.0.retain(|&(at, _)| at + RATE_ROUNDS > round);
        match self.0.back_mut() {
            Some((at, known)) if *at == round => *known = rate.max(*known),
            _ => self.0.push_back((round, rate)),
        }
    }

    fn highest(&self) -> Option<u64> {
        self.0.iter().map(|&(_, rate)| rate).max()
    }
}

impl Losses {
    /// Judges what became of enough packets, once a round; `window` is what may be under way.
    fn judge(&mut self, window: u64, mtu: u64) {
        if self.trial == Trial::None {
            // A cap that is above what the path needs is none.
            self.cap = self.cap.map(|cap| cap + cap / 100 + mtu).filter(|&cap| cap < 2 * window);
        }
        let Losses { lost, acked, .. } = *self;
        if lost + acked < JUDGED_PACKETS * mtu {
            return;
        }
        (self.lost, self.acked) = (0, 0);
        let share = lost as f64 / (lost + acked) as f64;
        match self.trial {
            Trial::None if share > self.by_chance * 1.5 + 0.02 => {
                self.trial = Trial::Begun(share);
                self.cap = Some(window * 7 / 10);
            }
            Trial::None => self.by_chance = self.by_chance.min(share * 0.05 + self.by_chance * 0.95),
            Trial::Begun(before) => self.trial = Trial::Judged(before),
            Trial::Judged(before) => {
                self.trial = Trial::None;
                if share > CHANCE_MAX * 1.5 + 0.02 {
                    self.trial = Trial::Begun(share);
                    self.cap = Some(window * 7 / 10);
                } else if share > before * 0.6 {
                    (self.by_chance, self.cap) = (share.min(CHANCE_MAX), None);
                }
            }
        }
    }
}

impl Model {
    pub(crate) fn new(mtu: u16) -> Model {
        let mtu = u64::from(mtu);
        Model {
            mtu,
            phase: Phase::Startup { rate: 0, rounds_without_growth: 0 },
            window: INITIAL_PACKETS * mtu,
            delivered: 0,
            delivered_at: None,
            sent: VecDeque::new(),
            newest_acked: None,
            rates: Rates::default(),
            round_trip: None,
            round_trip_at: None,
            round: Round::default(),
            settling: 0,
            gain: Gain::Normal,
            losses: Losses::default(),
        }
    }

    fn note_sent(&mut self, now: Instant) {
        if self.sent.back().is_some_and(|last| last.at == now) {
            return;
        }
        if self.sent.len() >= SENT_MAX {
            self.sent.pop_front();
        }
        let (delivered_at, acked_sent_at) = (self.delivered_at.unwrap_or(now), self.newest_acked.unwrap_or(now));
        self.sent.push_back(Sent { at: now, delivered: self.delivered, delivered_at, acked_sent_at });
    }

    fn note_acked(&mut self, now: Instant, sent: Instant, bytes: u64) {
        self.delivered += bytes;
        self.delivered_at = Some(now);
        self.round.acked += bytes;
        self.losses.acked += bytes;
        self.newest_acked = self.newest_acked.max(Some(sent));
        let took = now.saturating_duration_since(sent);
        self.round.shortest = Some(self.round.shortest.map_or(took, |shortest| shortest.min(took)));
        if let Phase::Sound { shortest, .. } = &mut self.phase {
            *shortest = took.min(*shortest);
        }
        if self.round_trip.is_none_or(|known| took <= known) {
            (self.round_trip, self.round_trip_at) = (Some(took), Some(now));
        }
    }

    /// After all packets of an acknowledgement; `is_idle`: there was not enough to send.
    fn note_all_acked(&mut self, now: Instant, is_idle: bool) {
        let Some(newest) = self.newest_acked else { return };
        let at = self.sent.partition_point(|sent| sent.at < newest);
        self.sent.drain(..at);
        let Some(sent) = self.sent.front().copied().filter(|sent| sent.at == newest) else { return };
        // Neither faster than it was sent nor than it was acknowledged (draft-cheng-iccrg-delivery-rate-estimation).
        let acked_in = now.saturating_duration_since(sent.delivered_at);
        let sent_in = sent.at.saturating_duration_since(sent.acked_sent_at);
        let took = acked_in.max(sent_in);
        if !took.is_zero() && self.round_trip.is_some_and(|shortest| took >= shortest) {
            let rate = ((self.delivered - sent.delivered) as f64 / took.as_secs_f64()) as u64;
            if !is_idle || self.rates.highest().is_none_or(|highest| rate > highest) {
                self.rates.note(self.round.no, rate);
            }
        }
        if sent.delivered >= self.round.ends_at {
            self.end_round(now, is_idle);
        }
        self.sound(now, is_idle);
        self.set_window();
    }

    fn end_round(&mut self, now: Instant, is_idle: bool) {
        let Round { no, lost, acked, shortest, .. } = self.round;
        self.round = Round { no: no + 1, ends_at: self.delivered, ..Round::default() };
        let (Some(rate), Some(round_trip), Some(shortest)) = (self.rates.highest(), self.round_trip, shortest) else { return };
        let is_much_lost = lost * 10 > lost + acked && lost + acked > 50 * self.mtu;
        match &mut self.phase {
            Phase::Startup { rate: before, rounds_without_growth } => {
                if rate * 4 >= *before * 5 {
                    (*before, *rounds_without_growth) = (rate, 0);
                } else if !is_idle {
                    *rounds_without_growth += 1;
                }
                let has_queue = shortest > round_trip * 5 / 4 + HOSTS;
                if *rounds_without_growth >= 3 || has_queue || is_much_lost {
                    (self.phase, self.settling) = (Phase::Cruise, 4);
                    self.round_trip_at = Some(now);
                }
            }
            Phase::Cruise if self.settling > 0 => self.settling -= 1,
            Phase::Cruise if shortest > round_trip * 3 / 2 + 3 * HOSTS => self.gain = Gain::Wide,
            Phase::Cruise | Phase::Sound { .. } => {}
        }
        if self.phase == Phase::Cruise && self.settling == 0 {
            self.losses.judge(self.window, self.mtu);
        } else {
            (self.losses.lost, self.losses.acked) = (0, 0);
        }
    }

    /// Looks for the length of the path when it wasn't seen for a while.
    fn sound(&mut self, now: Instant, is_idle: bool) {
        let Some((round_trip, at)) = self.round_trip.zip(self.round_trip_at) else { return };
        match self.phase {
            Phase::Cruise if now.saturating_duration_since(at) > ROUND_TRIP_LASTS && !is_idle => {
                self.phase = Phase::Sound { until: now + SOUND + round_trip, shortest: Duration::MAX };
            }
            Phase::Sound { until, shortest } if now >= until && shortest < Duration::MAX => {
                (self.round_trip, self.round_trip_at) = (Some(shortest), Some(now));
                (self.phase, self.gain, self.settling) = (Phase::Cruise, Gain::Normal, 2);
            }
            _ => {}
        }
    }

    fn set_window(&mut self) {
        let (Some(rate), Some(round_trip)) = (self.rates.highest(), self.round_trip) else { return };
        let within = |time: Duration| (rate as f64 * time.as_secs_f64()) as u64;
        let (path, hosts) = (within(round_trip), within(HOSTS));
        let window = match (self.phase, self.gain) {
            (Phase::Startup { .. }, _) => self.window.max(2 * (path + hosts)),
            (Phase::Sound { .. }, _) => path * 3 / 4,
            (Phase::Cruise, Gain::Normal) => path * 5 / 4 + hosts,
            (Phase::Cruise, Gain::Wide) => path * 2 + hosts,
        };
        let window = window.min(self.losses.cap.unwrap_or(u64::MAX));
        self.window = window.max(MIN_PACKETS * self.mtu);
    }

    /// All was lost for a while: that says nothing of what the path holds.
    fn note_outage(&mut self) {
        self.settling = self.settling.max(2);
        self.losses.trial = Trial::None;
    }

    fn note_lost(&mut self, bytes: u64) {
        self.round.lost += bytes;
        self.losses.lost += bytes;
    }
}

impl ControllerFactory for ModelFactory {
    fn build(self: Arc<Self>, _now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Model::new(current_mtu))
    }
}

impl Controller for Model {
    fn on_sent(&mut self, now: Instant, _bytes: u64, _last_packet_number: u64) {
        self.note_sent(now);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _rtt: &RttEstimator) {
        self.note_acked(now, sent, bytes);
    }

    fn on_end_acks(&mut self, now: Instant, _in_flight: u64, app_limited: bool, _largest_packet_num_acked: Option<u64>) {
        self.note_all_acked(now, app_limited);
    }

    fn on_congestion_event(&mut self, _now: Instant, _sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        if is_persistent_congestion {
            self.note_outage();
        } else {
            self.note_lost(lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
        self.window = self.window.max(MIN_PACKETS * self.mtu);
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests;

//! Which point fits a database that stands at a position.
//!
//! Of the home and the database the home is to be the newer one: what the database names has to be there, and what it
//! doesn't name harms nothing. So a position that lies between those of two points means the later one.

use crate::points::Point;

/// A position in the log of PostgreSQL: two hexadecimal numbers of 32 bits, `16/B374D848`; `None` for anything else.
fn log_position(text: &str) -> Option<u64> {
    let half = |text: &str| {
        let is_hex = (1..=8).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        is_hex.then(|| u64::from_str_radix(text, 16).ok()).flatten()
    };
    let (high, low) = text.trim().split_once('/')?;
    Some(half(high)? << 32 | half(low)?)
}

/// The point that fits: the newest of those that stand at `position`; where positions are PostgreSQL's, the first one that is
/// ahead of it, if another is behind.
///
/// `points` are all, the oldest first. What a person went back to counts for nothing: the database stood elsewhere.
///
/// # Errors
/// The two nearest that have a position, the older one first; fewer, where there are fewer.
pub fn fitting<'a>(points: &'a [Point], position: &str) -> Result<&'a Point, Vec<&'a Point>> {
    let told = || points.iter().filter(|point| !point.is_rewind).filter_map(|point| Some((point, point.position.as_deref()?)));
    let wanted = log_position(position);
    let is_it = |at: &str| at.trim() == position.trim() || wanted.is_some() && log_position(at) == wanted;
    if let Some((point, _)) = told().rfind(|(_, at)| is_it(at)) {
        return Ok(point);
    }
    let comparable: Vec<(&Point, u64)> = told().filter_map(|(point, at)| Some((point, log_position(at)?))).collect();
    let Some(wanted) = wanted.filter(|_| !comparable.is_empty()) else {
        let all: Vec<&Point> = told().map(|(point, _)| point).collect();
        return Err(all[all.len().saturating_sub(2)..].to_vec());
    };
    let behind = comparable.iter().rposition(|(_, at)| *at < wanted);
    let ahead = comparable[behind.map_or(0, |at| at + 1)..].iter().find(|(_, at)| *at > wanted);
    let nearest = match (behind, ahead) {
        (Some(_), Some((point, _))) => return Ok(point),
        (None, _) => &comparable[..comparable.len().min(2)],
        (Some(_), None) => &comparable[comparable.len().saturating_sub(2)..],
    };
    Err(nearest.iter().map(|(point, _)| *point).collect())
}

#[cfg(test)]
mod tests {
    use coldspare_core::control::Applied;
    use coldspare_core::{Seq, SessionId};

    use super::*;
    use crate::points::PointNo;

    fn points(positions: &[Option<&str>]) -> Vec<Point> {
        let applied = Applied { session: SessionId([1; 16]), seq: Seq(1), as_of_ms: 1 };
        let made = |(no, position): (u64, &Option<&str>)| {
            let position = position.map(String::from);
            Point { no: PointNo(no), applied, at_ms: no, changes: 1, bytes: 0, is_rewind: false, position }
        };
        (1..).zip(positions).map(made).collect()
    }

    #[track_caller]
    fn check(positions: &[Option<&str>], wanted: &str, expected: Result<u64, &[u64]>) {
        let points = points(positions);
        let found = fitting(&points, wanted);
        let numbers = |points: Vec<&Point>| points.iter().map(|point| point.no.0).collect::<Vec<_>>();
        assert_eq!(found.map(|point| point.no.0).map_err(numbers), expected.map_err(<[u64]>::to_vec), "{wanted} of {positions:?}");
    }

    #[test]
    fn the_newest_of_equal_points_fits_and_between_two_the_later_one() {
        let log = [Some("0/A"), None, Some("0/FF"), Some("0/FF"), Some("1/0")];
        check(&log, "0/FF", Ok(4));
        check(&log, "0/a", Ok(1));
        check(&log, "0/B", Ok(3));
        check(&log, "0/100", Ok(5));
        check(&log, "FFFFFFFF/0", Err(&[4, 5]));
        check(&log, "0/9", Err(&[1, 3]));
    }

    #[test]
    fn positions_that_do_not_compare_have_to_be_equal() {
        check(&[Some("a"), Some("b"), Some("b"), Some("c")], "b", Ok(3));
        check(&[Some("a"), Some("b"), Some("c")], "d", Err(&[2, 3]));
        check(&[Some("0/1"), Some("0/3")], "mysql-bin.7:12", Err(&[1, 2]));
        check(&[Some("a"), None], "0/1", Err(&[1]));
        check(&[None], "0/1", Err(&[]));
    }

    #[test]
    fn what_a_person_went_back_to_fits_nothing() {
        let mut points = points(&[Some("0/1"), Some("0/2"), Some("0/3")]);
        points[2].is_rewind = true;
        assert!(fitting(&points, "0/3").is_err());
    }

    #[test]
    fn a_position_of_postgresql_is_two_numbers() {
        for text in ["", "/", "1", "1/", "/1", "1/123456789", "+1/2", "0x1/2", "1/2/3", "g/1"] {
            assert_eq!(log_position(text), None, "{text}");
        }
        assert_eq!(log_position("16/B374D848"), Some(0x16_B374_D848));
    }
}

//! What a drive counts.

counters! {
    /// What a drive counts, with Firecracker's names.
    pub struct BlockMetrics {
        /// Activations that failed.
        activate_fails,
        /// Writes to configuration space, which has nothing to write.
        cfg_fails,
        /// Kicks that found an empty queue.
        no_avail_buffer,
        /// Events that ended in an error of the device.
        event_fails,
        /// Requests that failed on the host.
        execute_fails,
        /// Requests that made no sense.
        invalid_reqs_count,
        /// Flushes done.
        flush_count,
        /// Kicks.
        queue_event_count,
        /// Expiries of the rate limiter's timer.
        rate_limiter_event_count,
        /// Changes of the image or the rate limiter.
        update_count,
        /// Changes that failed.
        update_fails,
        /// Bytes read.
        read_bytes,
        /// Bytes written.
        write_bytes,
        /// Reads done.
        read_count,
        /// Writes done.
        write_count,
        /// Requests put off by the rate limiter.
        rate_limiter_throttled_events,
        /// Requests put off because the engine was full. It never is: it takes a whole queue.
        io_engine_throttled_events,
        /// Turns that ended with requests left in the queue.
        remaining_reqs_count,
    }
}

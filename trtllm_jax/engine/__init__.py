"""The engine: host-side batching around compiled steps, from submitted token ids to emitted token ids."""

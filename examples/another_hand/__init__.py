"""Another hand: does joint training do on drawings and words of people what it does in a synthetic world?"""
